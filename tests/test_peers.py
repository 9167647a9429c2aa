"""Peers: every one has its row, runs in turns with ours, says why where it cannot; what its numbers are read from."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import pretended_cuda
from torch import Tensor

from flux_quant.benchmarks.bench.record import OURS, Row
from flux_quant.benchmarks.bench.runner import LACK, groups
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.peers import SUITE, conversions, environments, linears, sdcpp_files, steps
from flux_quant.benchmarks.peers.catalogue import PEERS
from flux_quant.benchmarks.peers.contest import HERE, Contest, Crew, Entry, Worker
from flux_quant.components import BUNDLED, find_components
from flux_quant.errors import UserError

ALL = Asked(random=True, formats=("q8_0", "q4_0", "q4_k_s", "fp8"))


def test_every_peer_has_rows_of_its_own():
    cases = list(SUITE.cases(ALL))
    assert set(PEERS) == {name for name in PEERS if any(case.subject.startswith(name) for case in cases)}
    keys = Counter(Row(case.what, case.subject).key for case in cases)
    assert max(keys.values()) == 1
    together = list(groups(cases))
    names = [group[0].group for group in together if group[0].group]
    assert len(names) == len(set(names)), "contests of one name would be measured together"
    assert all(group[0].subject == OURS for group in together if len({case.subject for case in group}) > 1)


def test_formats_choose():
    found = {case.what.get("format") for case in SUITE.cases(Asked(formats=("q4_k_s",)))}
    assert found == {"q4_k", None}


def test_runners_are_where_the_catalogue_says():
    runners = {peer.runner for peer in PEERS.values() if peer.runner}
    assert runners == {path.stem for path in (HERE / "runners").glob("*.py")} - {"__init__"}
    assert all(peer.runner or peer.refusal for peer in PEERS.values())


def test_without_a_device_offloaders_say_so():
    cases = [case for case in SUITE.cases(Asked()) if case.what["work"] == "offload"]
    assert len(cases) == 4
    for case in cases:
        with pytest.raises(RuntimeError, match="CUDA device"):
            case.work()


def test_environments(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["environments"])
    assert environments.main() == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PEERS)
    monkeypatch.setattr(sys, "argv", ["environments", "torch"])
    assert environments.main() == 2 and "no environment for torch" in capsys.readouterr().err


def test_an_environment_that_was_not_made(tmp_path, monkeypatch):
    peer = PEERS["aircanvas"]
    monkeypatch.setattr(environments, "version", refuse)
    with pytest.raises(UserError, match="environments aircanvas"):
        environments.interpreter(peer)
    monkeypatch.setattr(environments, "folder_of", lambda peer: tmp_path)
    (tmp_path / environments.NOTE).write_text('{"version": "1.2"}')
    assert environments.installed(peer) == "1.2"
    assert Path(environments.interpreter(peer)).parent.parent == tmp_path


def refuse(name: str) -> str:
    raise environments.PackageNotFoundError(name)


def test_what_cannot_be_built_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(environments.shutil, "which", lambda tool: None)
    with pytest.raises(UserError, match="cmake and c"):
        environments.make(PEERS["stable-diffusion.cpp"])


def test_a_contest_in_turns():
    """Ours and a dense product on a small layer, in processes of their own."""
    (contest,) = (c for c in linears.contests("cpu", small=True) if c.what["bits"] == "8")
    ours, dense = contest.cases()[:2]
    assert ours.subject == OURS and dense.subject.startswith("torch ")
    try:
        rows = [case.work() for case in (ours, dense, dense, ours)]
        folder = Path(contest.folder.name)
        workers = [entry.worker for entry in contest.entries if entry.worker]
    finally:
        contest.close()
    assert len(workers) == 2 and all(worker.process.poll() == 0 for worker in workers) and not folder.exists()
    assert all(len(row.samples[kind]) == 1 for row in rows for kind in ("seconds", "cpu_seconds"))
    assert all(row.memory["host_rss"] > 1e7 for row in rows)
    packed, exact = rows[0].values, rows[1].values
    assert 43 < packed["weight_snr_db"] < 44 and packed["bits_per_weight"] == 8.5
    assert exact["weight_snr_db"] is None and exact["bits_per_weight"] == 32
    assert exact["times_ours"] > 0 and exact["cpu_times_ours"] > 0


def test_conversions_are_judged_by_what_is_in_the_file(tmp_path):
    (contest,) = (c for c in conversions.contests(small=True, wide=False) if "q8_0" in c.entries[0].name)
    shared = contest.material(tmp_path)
    entry = next(entry for entry in contest.entries if entry.peer == "gguf")
    pytest.importorskip("gguf")
    worker = Worker(sys.executable, PEERS["gguf"], 1, tmp_path / "log")
    try:
        worker.begin({**shared, "out": str(tmp_path / "out")})
        worker.ready()
        worker.say("once")
    finally:
        worker.close()
    found = contest.judge(shared, entry, tmp_path)
    assert 44 < found["weight_snr_db"] < 46 and 0.9 < found["packed_share"] <= 1
    assert found["source_bytes"] == find_components(BUNDLED).transformer.stat().st_size


@pytest.mark.parametrize("task", [{"kind": "step"}, {"kind": "linear", "material": "nowhere"}])
def test_a_worker_says_why_it_cannot(tmp_path, task):
    worker = Worker(sys.executable, PEERS["torch"], 1, tmp_path / "log")
    worker.begin({**task, "device": "cpu", "dtype": "float32"})
    with pytest.raises(RuntimeError, match="has nothing to do with step|No such file"):
        worker.ready()
    worker.close()
    assert worker.lost


def decoded(tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    """As stable-diffusion.cpp's TinyDecoder runs it: (16, h, w) -> (3, 8 h, 8 w)."""

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(
            x, tensors[f"decoder.layers.{name}.weight"], tensors.get(f"decoder.layers.{name}.bias"), padding=1
        )

    x = torch.tanh(latents[None] / 3) * 3
    for i in range(19):
        if i == 1:
            x = x.relu()
        elif i in (5, 10, 15):
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif f"decoder.layers.{i}.conv.0.weight" in tensors:
            h = conv(conv(conv(x, f"{i}.conv.0").relu(), f"{i}.conv.2").relu(), f"{i}.conv.4")
            x = (x + h).relu()
        else:
            x = conv(x, str(i))
    return x[0]


def test_pictures_tell_the_latents():
    latents = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(1))
    picture = 255 * decoded(sdcpp_files.autoencoder(), latents).permute(1, 2, 0)
    torch.testing.assert_close(picture, sdcpp_files.shown(latents), rtol=0, atol=1e-3)
    back = sdcpp_files.read_back(picture.round().to(torch.uint8))
    assert steps.relative(latents[: sdcpp_files.SHOWN], back) < 0.02


def test_a_step_is_judged_against_ours(tmp_path):
    shared = {"width": 64, "height": 64, "seed": 3}
    velocity = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
    ours, theirs = steps.readers("q8_0")[::2]
    torch.save({"velocity": velocity}, tmp_path / "ours")
    assert steps.judge(shared, ours, tmp_path / "ours") == {}
    noise = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(3))
    latents = noise - steps.unpack_latents(velocity, 4, 4)[0]
    for name, right in (("right", latents), ("wrong", latents + 0.5)):
        torch.save({"picture": sdcpp_files.shown(right).round().to(torch.uint8)}, tmp_path / name)
    assert steps.judge(shared, theirs, tmp_path / "right")["off_ours"] < 0.02
    assert steps.judge(shared, theirs, tmp_path / "wrong")["off_ours"] > 0.2


ON_DEVICE = Asked(device="cuda", quick=True)


def test_on_a_device_every_way_has_its_row():
    cases = list(SUITE.cases(ON_DEVICE))
    types = {case.what["type"] for case in cases if case.what["work"] == "linear"}
    assert {how for bits in linears.BITS for _, how in linears.ON_CUDA[bits]} <= types
    assert not types & set(linears.NEEDS_MORE)
    keys = Counter(Row(case.what, case.subject).key for case in cases)
    assert max(keys.values()) == 1
    works = list(dict.fromkeys(case.what["work"] for case in SUITE.cases(Asked(device="cuda"))))
    assert works == ["linear", "step", "offload", "convert"], "the more telling ones first"


def test_crews_are_kept_for_all_sizes_of_a_width():
    found = linears.contests("cuda", small=False)
    assert len(found) == len(linears.SIZES["cuda"]) * len(linears.BITS)
    assert len({id(contest.crew) for contest in found}) == len(linears.BITS)
    apart = linears.contests("cpu", small=True)
    assert len({id(contest.crew) for contest in apart}) == len(apart)


def crewed(crew: Crew, entries: list[Entry], number: int) -> Contest:
    def material(folder: Path) -> dict:
        path = folder / "linear.pt"
        weight = linears.student((16, 32))
        torch.save({"weight": weight, "input": torch.ones(8, 32), "packed": {}}, path)
        return {"kind": "linear", "material": str(path), "device": "cpu", "dtype": "float32"}

    return Contest({"work": "linear", "number": number}, entries, material, lambda *_: {}, 1.0, crew)


def test_a_crew_works_on_one_contest_after_the_other():
    """Its processes live until the last one ends; one that fails costs itself alone, and ours has to begin."""
    crew = Crew()
    contests = [
        crewed(crew, [Entry("torch", {"type": how}, {"how": how}) for how in ("float32", "bfloat16")], number)
        for number in range(2)
    ]
    contests[0].entries[1].task = {"how": "float32", "material": "nowhere"}
    try:
        first, second = contests[0].cases()
        with pytest.raises(RuntimeError, match=LACK):
            second.work()
        row = first.work()
        assert row.values["weight_snr_db"] is None and "begun_bytes" not in row.values
        with pytest.raises(RuntimeError, match="nowhere"):
            second.work()
        worker = contests[0].entries[0].worker
        first.close()
        assert worker.process.poll() is None
        assert contests[1].cases()[0].work().samples and contests[1].entries[0].worker is worker
    finally:
        for contest in contests:
            contest.close()
    assert worker.process.poll() == 0 and not crew.workers


def test_a_worker_that_takes_too_long_says_so(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    peer = environments.Peer("slow", "", "torch", str(tmp_path / "slow"))
    worker = Worker(sys.executable, peer, 1, tmp_path / "log", longest=0.2)
    worker.begin({"kind": "step"})
    with pytest.raises(RuntimeError, match="longer than 0 s"):
        worker.ready()
    worker.close()
    assert worker.process.poll() not in (None, 0)


def module(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


IN_PROCESS = {"flux_quant": "ours", "torch": "dense", "torch chain": "chain", "diffusers": "diffusers_gguf"}
PACKAGES = {"diffusers": ("diffusers", "gguf", "accelerate")}


@pytest.mark.parametrize(
    ("bits", "peer", "how"),
    [
        (bits, entry.peer, entry.task["how"])
        for bits in linears.BITS
        for entry in linears.entries(bits, "cuda", "bfloat16")
        if entry.peer in IN_PROCESS and not entry.task["how"].endswith(linears.COMPILED)
    ],
)
def test_layers_on_a_pretended_device(tmp_path, monkeypatch, bits, peer, how):
    """Weights and inputs are on the device and in BF16, and what comes out is the weight that went in."""
    for package in PACKAGES.get(peer, ()):
        pytest.importorskip(package)
    monkeypatch.setenv("FLUX_QUANT_DISABLE_TRITON", "1")
    monkeypatch.setattr(linears, "DISTINCT", 64)
    worker, runner = module(HERE / "worker.py"), module(HERE / "runners" / f"{IN_PROCESS[peer]}.py")
    monkeypatch.setattr(worker, "ENOUGH", 1e-4)
    contest = linears.contest(((128, 256), 256), bits, "cuda", Crew())
    with pretended_cuda(), torch.no_grad():
        shared = contest.material(tmp_path)
        once, found = worker.prepared(runner, {**shared, "how": how})
        memory = worker.memory(torch.device("cuda"))
        seconds, told = once(), found()
    assert set(seconds) == {"seconds", "device_seconds"} and min(seconds.values()) > 0
    assert memory["allocated"] > told["bytes"]
    least = {"8": 40, "fp8": 30, "4": 18}[bits]
    assert told["weight_snr_db"] is None if how == "bfloat16" else told["weight_snr_db"] > least
    assert told["own_snr_db"] > (25 if " as " in how else 45)
