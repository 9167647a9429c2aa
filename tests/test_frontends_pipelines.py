"""Whole pipelines from what people have: a ComfyUI folder, one file, a diffusers folder; VAE in tiles; public names."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_device import half_memory

import flux_quant
from flux_quant.components import BUNDLED, find_components
from flux_quant.errors import UserError
from flux_quant.frontends.pipelines import tiled_vae, vae_for
from flux_quant.loading import load_vae
from given_files import write_files

FILES = find_components(BUNDLED)
ALL_IN_ONE = {  # prefix -> component
    "model.diffusion_model.": "transformer",
    "text_encoders.t5xxl.transformer.": "t5",
    "text_encoders.clip_l.transformer.": "clip",
    "vae.": "vae",
}


def drawn(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(num_inference_steps=2, width=96, height=80, max_sequence_length=24)
    return np.asarray(pipe("penguin", generator=torch.Generator().manual_seed(0), **arguments).images[0]).astype(int)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return drawn(flux_quant.pipeline(FILES, device="cpu"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("given"))


def test_comfyui_folder_and_a_transformer_in_it(expected: np.ndarray):
    assert (drawn(flux_quant.pipeline(BUNDLED, device="cpu")) == expected).all()
    assert (drawn(flux_quant.pipeline(str(FILES.transformer), device="cpu")) == expected).all()


def test_all_in_one_file(expected: np.ndarray, tmp_path: Path):
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, component in ALL_IN_ONE.items()
        for name, tensor in load_file(getattr(FILES, component)).items()
    }
    path = tmp_path / "models" / "checkpoints" / "all.safetensors"
    path.parent.mkdir(parents=True)
    save_file(tensors, path)
    for component in ("t5", "clip"):  # files beside it are not taken instead of its own
        shutil.copy(getattr(FILES, component), path.parent)
    assert (drawn(flux_quant.pipeline(path, device="cpu", tokenizers=FILES.tokenizers)) == expected).all()


def test_diffusers_folder(expected: np.ndarray, tmp_path: Path):
    pipe = flux_quant.pipeline(BUNDLED, device="cpu")
    pipe.scheduler.register_to_config(base_shift=0.7)
    pipe.save_pretrained(tmp_path)
    again = flux_quant.pipeline(tmp_path, device="cpu")
    assert again.scheduler.config.base_shift == 0.7
    again.scheduler.register_to_config(base_shift=0.5)
    assert np.abs(drawn(again) - expected).max() <= 1


@pytest.mark.parametrize(("name", "kind"), [("fill", "FluxFillPipeline"), ("control", "FluxControlPipeline")])
def test_class_by_shapes(name: str, kind: str, files: Path):
    paths = {part: getattr(FILES, part) for part in ("t5", "clip", "vae", "tokenizers")}
    pipe = flux_quant.pipeline(files / f"{name}.safetensors", device="cpu", **paths)
    assert type(pipe).__name__ == kind and pipe.transformer.scheduler is pipe.scheduler


def test_class_by_name():
    from diffusers import FluxImg2ImgPipeline

    assert type(flux_quant.pipeline(BUNDLED, cls=FluxImg2ImgPipeline, device="cpu")) is FluxImg2ImgPipeline


def test_what_is_missing_is_named(tmp_path: Path):
    shutil.copy(FILES.transformer, tmp_path)
    with pytest.raises(UserError, match="no T5 encoder file found"):
        flux_quant.pipeline(tmp_path / FILES.transformer.name, device="cpu")
    with pytest.raises(UserError, match="no such file"):
        flux_quant.pipeline(tmp_path / "nothing", device="cpu")


@torch.no_grad()
def test_vae_under_a_budget_works_in_tiles():
    """All at once where there is room, as diffusers does it; and nearly that in tiles."""
    own, memory = load_vae(FILES.vae), half_memory()
    tiled = vae_for(FILES.vae, torch.device("cpu"), torch.float32, memory)
    assert isinstance(tiled, type(own)) and type(tiled) is tiled_vae()
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 16, 24, 40, generator=generator), torch.rand(1, 3, 192, 320, generator=generator) * 2 - 1
    memory.readings = Room(10**12)
    torch.testing.assert_close(tiled.decode(z).sample, own.decode(z).sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tiled.encode(x).latent_dist.mean, own.encode(x).latent_dist.mean)
    memory.readings = Room(30_000_000)
    for found, whole in (
        (tiled.decode(z, return_dict=False)[0], own.decode(z).sample),
        (tiled.encode(x).latent_dist.mean, own.encode(x).latent_dist.mean),
    ):
        assert found.shape == whole.shape and 0 < (found - whole).norm() < 0.1 * whole.norm()


class Room:
    """A device on which so much is free."""

    def __init__(self, free: int) -> None:
        self._free = free

    def free(self) -> int:
        return self._free

    def now(self) -> int:
        return 0

    def forget(self) -> None:
        pass


def test_public_names_are_there_and_cost_nothing():
    code = (
        "import sys, flux_quant\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert set(flux_quant.__all__) <= set(dir(flux_quant)) and set(flux_quant.__all__) == set(flux_quant.PLACES)\n"
        "assert all(callable(getattr(flux_quant, name)) for name in flux_quant.__all__)\n"
        "import flux_quant.generation, flux_quant.frontends.pipelines\n"
        "assert callable(flux_quant.pipeline)\n"
        "try: flux_quant.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
