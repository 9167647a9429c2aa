"""Other offloaders beside ours: which model they get, what they lack; and that they do their work."""

from types import SimpleNamespace

import pytest
import torch
from pretended_cuda import pretended_cuda
from torch import Tensor

from flux_quant.benchmarks import offloader_ways as ways
from flux_quant.benchmarks import offloaders
from flux_quant.benchmarks.step import inputs


def test_what_a_way_lacks_is_named():
    versions = dict.fromkeys(("diffusers", "accelerate", "gguf", "mmgp"), "1")
    assert not any(offloaders.missing(name, versions) for name in ways.WAYS)
    lacking = {name: offloaders.missing(name, versions | {"mmgp": None, "gguf": None}) for name in ways.WAYS}
    assert {name for name, package in lacking.items() if package == "mmgp"} == {"mmgp profile"}
    assert {name for name, package in lacking.items() if package == "gguf"} == {
        name for name, way in ways.WAYS.items() if way.gguf and way.library
    }
    nothing = dict.fromkeys(versions)
    assert [name for name in ways.WAYS if not offloaders.missing(name, nothing)] == ["flux_quant GGUF resident"]


def test_there_are_fewer_blocks_where_making_and_pinning_them_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(ways, "SAMPLE", (64, 128))
    monkeypatch.setattr(ways, "PIECES", 2)
    card = SimpleNamespace(is_cuda=True)
    threads = torch.get_num_threads()
    with pretended_cuda():
        for seconds, blocks in ((1e9, ways.FULL), (0.0, ways.FEWER[-1])):
            monkeypatch.setattr(ways, "ATTACHING", seconds)
            assert ways.affordable(card, small=False) == ways.Dense(False, blocks)
            assert f"{blocks[0]} + {blocks[1]} blocks" in capsys.readouterr().out
    assert ways.affordable(SimpleNamespace(is_cuda=False), small=True).blocks == ways.SMALLEST
    assert torch.get_num_threads() == threads


def test_bytes_are_those_of_the_model():
    assert 23.7e9 < ways.nbytes_of(ways.Dense(False, ways.FULL).config) < 23.9e9


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "mmgp"])
def test_streamed_by_others_it_is_the_same_model(monkeypatch, kind):
    """On a pretended device, under the arguments that are measured; the second step is the one with prefetching."""
    pytest.importorskip("diffusers")
    if kind == "mmgp":
        offload = pytest.importorskip("mmgp.offload")
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    asked = ways.Dense(True, (2, 3))
    with pretended_cuda() as runtime, torch.no_grad():
        stage = SimpleNamespace(place=torch.device("cuda", 0), is_cuda=True)
        arguments = inputs(asked.config, 32, 8, stage.place, torch.bfloat16)
        right = ways.resident(stage, asked, None)(arguments).cpu()
        if kind == "mmgp":
            profile = offload.profile
            monkeypatch.setattr(offload, "profile", lambda *a, **k: profile(*a, **k, budgets={"transformer": 6}))
            step = ways.profiled(stage, asked, None)
        else:
            step = ways.groups(kind)(stage, asked, None)
        for _ in range(2):
            runtime.copies.clear()
            assert torch.equal(step(arguments).cpu(), right)
        moved = sum(nbytes for to, source, _, nbytes in runtime.copies if (to, source) == ("cuda", "cpu"))
        assert moved > 0.9 * ways.nbytes_of(asked.config)
    assert torch.empty(0).device.type == "cpu", "it left another device as the default"
