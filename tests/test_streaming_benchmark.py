"""The benchmark of streaming: slower links, rows that survive, what they hold, others' offloaders on the same model."""

import json
from importlib.util import find_spec
from math import prod
from pathlib import Path

import pytest
import torch

from flux_quant.benchmarks import aims, offloader_ways, offloaders, stage, streaming, text_and_vae
from flux_quant.benchmarks.journal import Journal
from flux_quant.benchmarks.links import HostLink, Slower, Synchronous, rate_of
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE
from flux_quant.errors import UserError
from flux_quant.loading import load_flux
from flux_quant.model import Flux
from flux_quant.planner.footprint import CONTEXT
from flux_quant.planner.phases import VAE_WEIGHTS

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


class Counted(Synchronous):
    def __init__(self) -> None:
        self.moved: list[int] = []

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        assert len(to) == len(source)
        self.moved.append(len(source))
        super().copy(to, source)


class SlowerCounted(Slower, Counted):
    native = 48e9


@pytest.mark.parametrize("rate", [47.9e9, 24e9, 17e9, 12e9, 1e9])
def test_a_slower_link_moves_as_many_bytes_as_its_time_takes(rate: float):
    link, source, to = SlowerCounted(), torch.randint(256, (10_007,), dtype=torch.uint8), torch.zeros(10_007).byte()
    link.emulate(rate)
    link.copy(to, source)
    assert sum(link.moved) == pytest.approx(len(source) * link.native / rate, abs=1)
    assert torch.equal(to, source) and link.moved[0] == len(source)
    link.emulate(None)
    link.copy(to, source)
    assert link.moved[-1] == len(source)


def test_a_faster_link_is_not_emulated():
    with pytest.raises(UserError, match="48.0 GB/s"):
        SlowerCounted().emulate(50e9)


def test_rates_are_those_of_copies_that_arrive():
    class Lossy(HostLink):
        def copy(self, to, source):
            super().copy(to[99:], source[99:])

    assert len(rate_of(HostLink(), 1 << 16, 3)) == 3
    with pytest.raises(AssertionError, match="arrived"):
        rate_of(Lossy(), 1 << 16)


def failing() -> dict[str, object]:
    raise torch.OutOfMemoryError("no room\nat all")


def read(journal: Journal) -> dict[str, list[dict]]:
    (path,) = journal.folder.glob("*/*-*.json")
    return json.loads(path.read_text())


def test_rows_are_on_the_drive_as_soon_as_they_are_known(tmp_path: Path):
    journal = Journal("it", 60, True, tmp_path, {"native": 1.5})
    assert journal.row({"what": "a"}, lambda: {"seconds": 2.0})["seconds"] == 2.0
    assert [row["what"] for row in read(journal)["rows"]] == ["a"] and read(journal)["native"] == 1.5
    assert journal.row({"what": "b"}, failing) is None
    assert journal.row({"what": "c"}, dict, needs=100) is None
    assert [row["what"] for row in read(journal)["rows"]] == ["a"]
    reasons = {row["what"]: row["why"] for row in read(journal)["skipped"]}
    assert reasons["b"] == "OutOfMemoryError: no room at all" and "it needs 100 s" in reasons["c"]


def test_mistakes_of_the_benchmark_itself_are_not_rows(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        Journal("it", 60, True, tmp_path).row({"what": "a"}, lambda: {"x": 1 / 0})


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What a walk on the stand-in wrote."""
    journal = Journal("streaming", 600, True, tmp_path_factory.mktemp("results"))
    here = stage.Stage(stage.open_link(stage.SMALL_LINK), stage.GPUS[stage.STAND_IN].machine(), stage.NoReadings(), 0)
    bench = streaming.Bench("q8_0", here, small=True)
    streaming.measure_format(journal, bench, streaming.cases("q8_0", small=True))
    assert bench.model is None and here.link.rate is None
    return read(journal)


def test_steps_are_told_by_their_larger_bound(walked: dict[str, list[dict]]):
    assert not walked["skipped"]
    steps = [row for row in walked["rows"] if row["what"] == "step"]
    assert len(steps) == len(streaming.ON_STAND_IN)
    for row in steps:
        plan, timed = row["plan"], sorted(row["samples"][row["warm"] :])
        assert row["seconds"] == timed[len(timed) // 2] and len(timed) in (streaming.TIMED, streaming.TIMED_SLOW)
        assert row["ratio"] == pytest.approx(row["seconds"] / max(row["compute"], row["copies"]))
        assert row["copies"] == pytest.approx(plan["streamed_bytes"] / row["link_gb_per_s"] / 1e9)
        assert bool(plan["streamed_bytes"]) == bool(row["vram"]), "under a budget blocks stream"
        if row["vram"] is None:
            assert row["ratio"] == 1 and len(plan["resident"]) == 5
        assert row["misses"] == row["resyncs"] == 0


def test_only_emulated_rows_are_marked_so(walked: dict[str, list[dict]]):
    rows = [row for row in walked["rows"] if "emulated_gb_per_s" in row]
    assert [row["emulated_gb_per_s"] for row in rows] == [0.02]
    here = {row["link_gb_per_s"] for row in walked["rows"] if row["what"] == "step" and row not in rows}
    assert len(here) == 1 and rows[0]["link_gb_per_s"] not in here, "measured once each"


def test_ram_and_modulation_have_rows(walked: dict[str, list[dict]]):
    ram, modulation = walked["rows"][:2]
    assert ram["what"] == "ram" and ram["pageable"] == 0 < ram["pinned"] < ram["bytes"]
    assert modulation["what"] == "modulation" and 0 < modulation["bytes"] < ram["bytes"]


def test_plans_of_the_benchmark_are_the_planners_own():
    """Without a limit all blocks stay on a large card, and 8 GB of it stream some of BF16."""
    machine = stage.GPUS["h100-80gb"].machine()
    here = stage.Stage(HostLink(), machine, stage.NoReadings(), 0)
    here.link.native = 50e9
    with torch.device("meta"):
        model = Flux(streaming.FluxConfig(**DEV, double_blocks=DOUBLE, single_blocks=SINGLE)).bfloat16()
    bench = streaming.Bench("bf16", here, small=False)
    bench.model = model
    plans = {vram: bench.plan(streaming.Case(1024, vram), here.memory(vram)) for vram in (None, "4GB", "8GB")}
    assert not plans[None].stream.streamed
    assert 0 < plans["8GB"].stream.streamed_bytes < plans["4GB"].stream.streamed_bytes < 17.4e9
    assert all(plan.peak <= plan.budget.nbytes for plan in plans.values())
    slot = streaming.one_slot(model)
    assert slot.sizes == plans["4GB"].stream.sizes and slot.device_bytes == max(slot.sizes)


def test_every_format_is_measured_without_a_limit_first():
    for name in streaming.FORMATS:
        known = set()
        for case in streaming.cases(name, small=False):
            if case.vram is None and case.link is None:
                known.add((case.size, case.batch))
            assert (case.size, case.batch) in known, case


@needs_diffusers
def test_the_vae_is_the_one_of_flux():
    with torch.device("meta"):
        model = text_and_vae.random_vae.__wrapped__(small=False)  # the real one is kept
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) < VAE_WEIGHTS
    assert sum(parameter.numel() for parameter in model.parameters()) == VAE_WEIGHTS


@needs_diffusers
def test_others_have_the_same_transformer():
    from diffusers import FluxTransformer2DModel

    config = offloader_ways.config_of(DEV, (DOUBLE, SINGLE))
    with torch.device("meta"):
        theirs, ours = FluxTransformer2DModel(**offloader_ways.diffusers_config(config)), Flux(config)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == sum(parameter.numel() for parameter in ours.parameters()) > 11.9e9


@needs_diffusers
def test_a_way_of_others_runs_in_a_process_of_its_own(tmp_path: Path):
    journal = Journal("offloaders", 300, True, tmp_path)
    offloaders.run_way("diffusers group offloading, block", journal, small=True, folder=tmp_path)
    (row,) = read(journal)["rows"]
    assert row["way"] == "diffusers group offloading, block" and row["vram"] == "4GB" and row["seconds"] > 0
    assert not read(journal)["skipped"]


def test_a_way_that_fails_is_named(tmp_path: Path):
    journal = Journal("offloaders", 300, True, tmp_path)
    offloaders.run_way("nobody's", journal, small=True, folder=tmp_path)
    assert "nobody" in read(journal)["skipped"][0]["why"]


def test_the_file_for_gguf_readers_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    narrow = dict(DEV, hidden=256, mlp=1024, context=256, head_dim=64)
    monkeypatch.setattr(offloader_ways, "DEV", narrow)
    config = offloader_ways.write_gguf(tmp_path / "it.gguf", small=True)
    model = load_flux(tmp_path / "it.gguf")
    assert model.config == config and model.double_blocks[0].img_attn.qkv.fmt.name == offloader_ways.GGUF_FORMAT
    with torch.device("meta"):
        expected = sum(prod(parameter.shape) for parameter in Flux(config).parameters())
    linears = [layer for layer in model.modules() if hasattr(layer, "in_features")]
    stored = sum(layer.in_features * layer.out_features for layer in linears)
    assert stored + sum(parameter.numel() for parameter in model.parameters()) == expected


def streaming_results(ratio: float, peak: int, ram: float, theirs: float) -> aims.Results:
    row = dict(what="step", format="bf16", size=512, batch=1, vram="4GB", budget=4_000_000_000, seconds=0.4, peak=peak)
    steps = [row | {"ratio": ratio}, row | {"ratio": 1.0, "emulated_gb_per_s": 12.0}, row | {"ratio": 1, "vram": None}]
    vae = {"what": "vae", "vram": "6GB", "budget": 6_000_000_000, "peak": peak}
    ours = {"rows": [*steps, {"what": "ram", "format": "bf16", "ram_ratio": ram}, vae, vae | {"vram": None}]}
    others = [{"way": w, "size": 512, "vram": "4GB", "seconds": s} for w, s in (("a", theirs), ("b", 9.0))]
    return {"streaming": ours, "offloaders": {"rows": [*others, others[0] | {"seconds": 0.1, "reduced_to": [4, 8]}]}}


def test_aims_of_streaming_are_judged():
    def judged(results: aims.Results) -> dict[str, tuple[int, float]]:
        return {row["aim"]: (row["measured"], row["worst"], len(row["missed"])) for row in aims.judged(results)}

    good = judged(streaming_results(1.04, 3_900_000_000, 1.002, 0.8))
    assert good["a streamed step, times max(compute, copies)"] == (1, 1.04, 0)
    assert good["the same over an emulated slower link"] == (1, 1.0, 0)
    assert good["peak of the steps, share of the budget"] == (2, 0.975, 0)
    assert good["peak of T5 and VAE, share of the budget"] == (1, 0.65, 0)
    assert good["streamed BF16, times the fastest offloader"] == (1, 0.5, 0)
    bad = judged(streaming_results(1.2, 4_100_000_000, 1.3, 0.3))
    missed = {aim: missed for aim, (_, _, missed) in bad.items() if missed}
    assert list(missed.values()) == [1, 2, 1, 1] and "RAM, times the bytes of the weights" in missed
    assert judged({"streaming": {"rows": []}})["RAM, times the bytes of the weights"][0] == 0


class FakeCuda:
    """What the driver and torch say of a card of 80 GB, on which somebody else holds 2 GB and CUDA itself 0.5 GB."""

    total, reserved, peak, allocated = 80 * 10**9, 3 * 10**9, 35 * 10**8, 31 * 10**8
    fractions: list[float]

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fractions = []
        said = {
            "mem_get_info": (self.total - self.reserved - 25 * 10**8, self.total),
            "memory_reserved": self.reserved,
            "max_memory_reserved": self.peak,
            "max_memory_allocated": self.allocated,
            "get_device_properties": type("", (), {"total_memory": self.total}),
            "empty_cache": None,
            "reset_peak_memory_stats": None,
        }
        for name, value in said.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, _: self.fractions.append(f))


def test_the_device_is_really_capped_and_others_do_not_count(monkeypatch: pytest.MonkeyPatch):
    fake, link = FakeCuda(monkeypatch), HostLink()
    link.device = torch.device("cuda", 0)
    machine = stage.GPUS["h100-80gb"].machine()
    here = stage.Stage(link, machine, stage.CudaReadings(link.device), 2 * 10**9)
    with here.capped(here.memory("8GB")):
        assert fake.fractions == [(8 * 10**9 - CONTEXT) / fake.total]
        held = here.held()
    assert fake.fractions[1:] == [1.0]
    assert held == {
        "peak_torch": fake.peak,
        "peak_allocated": fake.allocated,
        "beside_torch": 5 * 10**8,
        "peak": 4 * 10**9,
    }


def test_memory_that_is_in_use(monkeypatch: pytest.MonkeyPatch):
    for said, expected in (("3", 3 << 20), ("[N/A]", 0), (None, 0)):
        monkeypatch.setattr(stage, "output_of", lambda *_, said=said: said)
        assert stage.memory_in_use() == expected


def test_plans_go_by_the_link_that_is_emulated():
    here = stage.Stage(HostLink(), stage.GPUS[stage.STAND_IN].machine(), stage.NoReadings(), 7)
    assert here.held() == {}  # the stand-in does not know
    assert here.memory("4GB").machine.pinned == here.link.native == 0.0
    assert here.memory("4GB", 12e9).machine.pinned == 12e9
