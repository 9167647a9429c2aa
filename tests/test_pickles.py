"""PyTorch pickles: tensors are read, nothing is executed, everything else is refused in one line."""

import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import open_component
from flux_quant.converters.container import TensorInfo
from flux_quant.errors import UserError

STATE = {"a.weight": torch.arange(12.0).view(3, 4).bfloat16(), "a.bias": torch.ones(3), "ids": torch.arange(5)}
NESTED = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 1e-4}},
    "model": lambda state: {"model": {"state_dict": state}},
    "parameters": lambda state: {n: nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in state.items()},
}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_state(tmp_path, nest, zipped):
    path = tmp_path / "model.pt"
    torch.save(nest(STATE), path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as reader:
        assert reader.container == "PyTorch" and not reader.notes and reader.path == path
        assert reader.tensors == {
            "a.weight": TensorInfo("a.weight", (3, 4), "bf16"),
            "a.bias": TensorInfo("a.bias", (3,), "f32"),
        }
        assert reader.foreign == {"ids": TensorInfo("ids", (5,), "i64")}
        assert torch.equal(load(reader, "a.weight"), STATE["a.weight"].float()) and reader.nbytes("a.weight") == 24
        reader.forget("a.weight")


def test_values_are_mapped_and_views_are_cut_out(tmp_path):
    whole = torch.randn(64, 8)
    torch.save({"whole": whole, "rows": whole[3:7], "turned": whole.t()}, tmp_path / "x.ckpt")
    with open_checkpoint(tmp_path / "x.ckpt") as reader:
        assert torch.equal(load(reader, "whole"), whole)
        assert torch.equal(load(reader, "rows"), whole[3:7]) and torch.equal(load(reader, "turned"), whole.t())
        (one,), (two,) = reader.read("whole"), reader.read("whole")
        assert one.data_ptr() == two.data_ptr()


def test_what_is_no_tensor_is_named(tmp_path):
    torch.save({**STATE, "step": 7, "name": "x"}, tmp_path / "x.pt")
    (note,) = open_checkpoint(tmp_path / "x.pt").notes
    assert "2 entries that are no tensors were left out (name, step)" in note


def test_scaled_fp8_in_a_pickle(tmp_path):
    data = torch.randn(4, 8).to(torch.float8_e4m3fn)
    torch.save({"m.weight": data, "m.scale_weight": torch.tensor(0.5)}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as reader:
        assert reader.tensors["m.weight"].format == "fp8"
        assert torch.equal(load(reader, "m.weight"), data.float() / 2)
    torch.save({"m.scale_weight": torch.tensor(0.5)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="m.weight is missing"):
        open_checkpoint(tmp_path / "x.pt")


def test_transformers_shards(tmp_path):
    """`pytorch_model-0000N-of-0000M.bin` in a folder with config.json, as repositories had them before safetensors."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    state = T5EncoderModel(config).state_dict()
    (tmp_path / "config.json").write_text("{}")
    for i, names in enumerate((list(state)[:5], list(state)[5:])):
        torch.save({name: state[name] for name in names}, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    with open_component(tmp_path, "T5 encoder") as reader:
        assert len(reader.tensors) == 12 and len(reader.ignored) <= 1
        assert torch.equal(load(reader, "shared.weight"), state["shared.weight"])


class Payload:
    """What an attacker would put in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def attack(path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Payload(path.with_suffix(".ran"))}, path)


def attack_of_old(path: Path) -> None:
    path.write_bytes(pickle.dumps({"b": Payload(path.with_suffix(".ran"))}, protocol=2))


def compressed(path: Path) -> None:
    torch.save(STATE, path.with_suffix(".tmp"))
    with zipfile.ZipFile(path.with_suffix(".tmp")) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))


def cut(path: Path) -> None:
    torch.save({"a": torch.ones(5000)}, path)
    path.write_bytes(path.read_bytes()[:9000])


def large_program(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", bytes(20_000_001))


def save(content: object):
    return lambda path: torch.save(content, path)


def expanded() -> Tensor:
    return torch.ones(1).expand(1 << 40)


REFUSED = {
    "code": (attack, "holds more than tensors"),
    "code in an old pickle": (attack_of_old, "holds more than tensors"),
    "a module": (save(nn.Linear(2, 2)), "holds more than tensors"),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path)), "compressed archive"),
    "a list": (save([torch.ones(2)]), "without a table of tensors"),
    "no tensor": (save({"state_dict": {"a": 1}}), "without a table of tensors"),
    "a sparse tensor": (save({"a": torch.ones(2, 2).to_sparse()}), "a is no ordinary tensor"),
    "more values than stored": (save({"a": expanded()}), "larger than what is stored"),
    "compressed": (compressed, "compressed archive"),
    "cut": (cut, "damaged pickle"),
    "large program": (large_program, "absurd"),
    "only its beginning": (lambda path: path.write_bytes(b"\x80\x02}"), "is damaged"),
    "zip of nothing": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)), "damaged pickle"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_refused(tmp_path, make, message):
    path = tmp_path / "x.pt"
    make(path)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and not path.with_suffix(".ran").exists()


def test_the_attack_is_real(tmp_path):
    attack(tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "x.ran").exists()


def test_damaged_bytes(tmp_path):
    """Flipped, cut and copied bytes of both forms: a UserError or a correct read, and nothing else."""
    state = {f"{i}.weight": torch.full((4, 4), float(i)) for i in range(3)}
    path, refused = tmp_path / "x.pt", 0
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        good = path.read_bytes()
        for seed in range(300):
            rng, data = random.Random(seed), bytearray(good)
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
            if seed % 3 == 0:
                del data[rng.randrange(len(data)) :]
            path.write_bytes(bytes(data) or b"\x80")
            try:
                with open_checkpoint(path) as reader:
                    assert all(load(reader, name).shape == info.shape for name, info in reader.tensors.items())
            except UserError:
                refused += 1
    assert 300 < refused < 600
