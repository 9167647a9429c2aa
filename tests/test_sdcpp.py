"""stable-diffusion.cpp as a judge of the files we write: it loads them, draws with them, reads back what is in them.

It runs where it is installed: `pip install stable-diffusion-cpp-python`, which builds it, or
`python -I -m flux_quant.benchmarks.peers.environments stable-diffusion.cpp`.

Its words are 256 zero vectors and its pooled vector is zero (see `sdcpp_files`), so inputs of txt_in and vector_in are
zero too: their weights are judged by reading them back alone.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.peers import sdcpp_files
from flux_quant.benchmarks.peers.catalogue import PEERS
from flux_quant.benchmarks.peers.contest import Worker
from flux_quant.benchmarks.peers.environments import installed, interpreter
from flux_quant.benchmarks.peers.steps import relative
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.converters.writer import create_checkpoint
from flux_quant.loading import load_flux
from flux_quant.model import Flux, image_ids, pack_latents, text_ids, unpack_latents

PEER = PEERS["stable-diffusion.cpp"]
PYTHON = interpreter(PEER) if installed(PEER) else None  # before tests get a cache of their own
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason=f"{PEER.distribution} is not installed"),
    pytest.mark.slow,
]

# Its heads have 128 channels and its T5 has 4096; the width and the number of blocks are the file's.
CONFIG = FluxConfig(64, 64, 256, 128, 1024, 4096, 768, 2, 3, True)
RECIPES = ("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0")
RECIPES += ("iq4_nl", "iq4_xs", "q3_k_s", "q2_k", "f16", "bf16", "f32")
SIDE, SEED, GUIDANCE = 64, 7, 3.5
# Both multiply with what is in the file. It rounds activations to 8 bits, or to 16 where weights have as many, and
# shows latents in 8 bits: 0.8 % were found for plain weights, 1.1 to 1.9 % for packed ones.
OFF = 0.03


def random_weights() -> dict[str, Tensor]:
    """By name: matrices that keep the size of what they multiply, small biases, scales around 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Flux(CONFIG).state_dict().items()}
    out = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        out[name] = value / (shape[-1] ** 0.5 if len(shape) == 2 else 20) + float(name.endswith("scale"))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With flux.safetensors, a model in float32, and what stable-diffusion.cpp wants beside it."""
    path = tmp_path_factory.mktemp("sdcpp")
    weights = random_weights()
    infos = [TensorInfo(name, tuple(value.shape), "f32") for name, value in weights.items()]
    with create_checkpoint(path / "flux.safetensors", infos, {}) as writer:
        for info in infos:
            writer.write(info.name, (weights[info.name],))
    sdcpp_files.write_clip(path / "clip.gguf")
    sdcpp_files.write_autoencoder(path / "autoencoder.safetensors")
    return path


@pytest.fixture(scope="module")
def converted(folder: Path) -> Callable[[str], Path]:
    def file(recipe: str) -> Path:
        target = folder / f"flux-{recipe}.gguf"
        if not target.exists():
            run(make_plan(Conversion(folder / "flux.safetensors", target, recipe, search=False)))
        return target

    return file


def told(folder: Path, task: dict, words: tuple[str, ...]) -> tuple[dict, str]:
    """The last answer of its worker, and what it printed."""
    log = folder / "log"
    worker = Worker(PYTHON, PEER, {**task, "device": "cpu", "out": str(folder / "out")}, 1, log)
    try:
        answers = [worker.say(word) for word in words]
    finally:
        worker.close()
    return answers[-1], log.read_text(errors="replace")


def drawn(folder: Path, model: Path) -> tuple[Tensor, str]:
    """Three channels (3, h, w) of the latents after one step, as it shows them, and what it printed."""
    files = {"model": model, "clip": folder / "clip.gguf", "autoencoder": folder / "autoencoder.safetensors"}
    picture = {"width": SIDE, "height": SIDE, "seed": SEED, "guidance": GUIDANCE}
    task = {"kind": "step", **{name: str(path) for name, path in files.items()}, **picture}
    _, log = told(folder, task, ("once", "found"))
    return sdcpp_files.read_back(torch.load(folder / "out", weights_only=True)["picture"]), log


@torch.no_grad()
def ours(model: Flux) -> tuple[Tensor, Tensor]:
    """The noise, and the velocity that our engine finds for it: three channels (3, h, w) each."""
    rows = SIDE // 16
    noise = torch.randn(1, 16, 2 * rows, 2 * rows, generator=torch.Generator().manual_seed(SEED))
    txt, pooled, one = torch.zeros(1, sdcpp_files.WORDS, CONFIG.context), torch.zeros(1, CONFIG.pooled), torch.ones(1)
    ids = image_ids(rows, rows), text_ids(sdcpp_files.WORDS)
    velocity = model(pack_latents(noise), txt, pooled, one, *ids, GUIDANCE * one)
    shown = slice(sdcpp_files.SHOWN)
    return noise[0, shown], unpack_latents(velocity, rows, rows)[0, shown]


def types_in(log: str) -> dict[str, int]:
    """Of the transformer's tensors, by its own account."""
    (line,) = re.findall(r"Diffusion model weight type stat:(.*)", log)
    return {name.lower(): int(count) for name, count in re.findall(r"(\w+):\s*(\d+)", line)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_draws_what_we_draw(folder, converted, recipe):
    latents, log = drawn(folder, converted(recipe))
    with open_checkpoint(converted(recipe)) as reader:
        assert types_in(log) == Counter(info.format for info in reader.tensors.values())
    noise, velocity = ours(load_flux(converted(recipe)))
    assert relative(velocity, noise - latents) < OFF


@pytest.mark.parametrize("changed", ["single_blocks.1.linear2", "double_blocks.0.txt_attn.proj", "img_in"])
def test_another_weight_would_be_seen(folder, converted, changed):
    latents, _ = drawn(folder, converted("q8_0"))
    model = load_flux(converted("q8_0"))
    layer = model.get_submodule(changed)
    layer.register_forward_hook(lambda layer, args, out: 0.5 * out)
    noise, velocity = ours(model)
    assert relative(velocity, noise - latents) > 2 * OFF


@pytest.mark.parametrize("recipe", RECIPES)
def test_its_converter_reads_what_we_wrote(folder, converted, recipe):
    """Every tensor, unpacked by ggml: the same values, to the last bit or the one before."""
    target = folder / "back.gguf"
    files = {"source": str(converted(recipe)), "target": str(target)}
    told(folder, {"kind": "convert", "format": "f32", **files}, ("once",))
    with open_checkpoint(converted(recipe)) as written, open_checkpoint(target) as back:
        assert set(back.tensors) == set(written.tensors)
        for name, info in written.tensors.items():
            assert back.tensors[name].shape == info.shape
            torch.testing.assert_close(load(back, name).float(), load(written, name).float(), rtol=1e-6, atol=1e-9)
