"""`flux-quant bench`: what is written between commas, turns, resuming, being interrupted, what a file holds."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from flux_quant.benchmarks.bench import models, session, sweep
from flux_quant.benchmarks.bench.record import MEASURED, SKIPPED, Row, Run, read_run, slug, write_run
from flux_quant.benchmarks.bench.runner import LACK, Runner, Watcher, groups
from flux_quant.benchmarks.bench.show import line, tables
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite
from flux_quant.cli import main
from flux_quant.errors import UserError

SWEEPS = {
    sweep.formats: {"q8_0": ("q8_0",), "Q4_K_S,q8_0 , q4_k_s": ("q4_k_s", "q8_0"), "fp8,q4_k": ("fp8", "q4_k")},
    sweep.budgets: {"6GB": (6 * 10**9,), "7.5GiB,900MB": (int(7.5 * 2**30), 900 * 10**6)},
    sweep.sizes: {"512": ((512, 512),), "512,1920x1072": ((512, 512), (1920, 1072)), "64X80": ((64, 80),)},
    sweep.counts: {"4,20": (4, 20), "1": (1,)},
}


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [(read, text, expected) for read, found in SWEEPS.items() for text, expected in found.items()],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_lists_are_read(read: Callable, text: str, expected: tuple):
    assert read(text) == expected and read(None) == ()


MISTAKES = {
    "format": (["--formats", "q4_k_s,q9"], "--formats q9: unknown; choose from q2_k"),
    "nothing between commas": (["--formats", "q4_k_s,,q8_0"], "none of them empty"),
    "size": (["--size", "512,wide"], "--size wide: write it as WIDTHxHEIGHT"),
    "odd size": (["--size", "500x512"], "--size 500x512: both sides must be multiples of 16"),
    "no size": (["--size", "0x0"], "both sides must be multiples of 16"),
    "steps": (["--steps", "4,0"], "--steps 0: write whole numbers from 1 on"),
    "vram": (["--vram", "much", "--device", "cpu"], "--vram much is about a CUDA GPU"),
    "suite": (["speed"], "suite speed: there is none of that name; choose from tiers"),
    "minutes": (["--minutes", "0"], "--minutes 0: should be more than nothing"),
    "model and random": (["--model", "a.gguf", "--random"], "--model and --random exclude each other"),
    "model": (["--model", "no/such.gguf"], "no/such.gguf: no such file or directory"),
    "repeats": (["--repeats", "0"], "--repeats"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options]) == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert message in text and not list(tmp_path.iterdir())


def test_names_of_a_sweep_are_read_back():
    for nbytes in (6 * 10**9, 7_500_000_000, 900_000_000):
        assert sweep.budgets(sweep.named_budget(nbytes)) == (nbytes,)
    assert sweep.sizes(sweep.named_size((1920, 1072))) == ((1920, 1072),)


# --- Turns ------------------------------------------------------------------------------------------------------------


@dataclass
class Told(Watcher):
    rows: list[Row] = field(default_factory=list)

    def has(self, row: Row) -> None:
        self.rows.append(row)


def runner(folder: Path, repeats: int = 3, **more: object) -> Runner:
    run = Run("it", "flux-quant bench it", "2026-01-02T03:04:05+00:00", {"kind": "shipped"}, {"device": "CPU x"})
    return Runner(run, folder / "it.json", repeats, **{"until": float("inf")} | more)


def case(name: str, log: list[str], group: str = "", samples: int = 1, **more: object) -> Case:
    def work() -> Row:
        log.append(name)
        return Row(samples={"seconds": [float(len(log))] * samples}, values={"calls": len(log)})

    return Case({"format": name}, work, group=group, close=lambda: log.append(f"{name} closed"), **more)


def test_cases_of_a_group_take_turns_and_others_are_called_once(tmp_path: Path):
    log: list[str] = []
    cases = [case("a", log, "g"), case("b", log, "g"), case("c", log), case("d", log), case("e", log, "h", samples=9)]
    bench = runner(tmp_path)
    bench.measure(cases)
    assert log == [
        *("a", "b", "b", "a", "a", "b", "a closed", "b closed"),
        *("c", "c closed", "d", "d closed"),
        *("e", "e", "e closed"),  # twice at least, and no more once there are enough
    ]
    rows = {row.what["format"]: row for row in read_run(bench.path).rows}
    assert rows["a"].samples["seconds"] == [1.0, 4.0, 5.0] and rows["b"].samples["seconds"] == [2.0, 3.0, 6.0]
    assert rows["a"].values["calls"] == 5 and len(rows["e"].samples["seconds"]) == 18
    assert [len(group) for group in groups(cases)] == [2, 1, 1, 1]


def test_a_case_that_fails_is_a_row_that_says_why(tmp_path: Path):
    log: list[str] = []
    calls = iter([Row(samples={"seconds": [1.0]}), UserError("no room\nat all"), Row(samples={"seconds": [9.0]})])

    def at_times() -> Row:
        found = next(calls)
        if isinstance(found, Exception):
            raise found
        return found

    def never() -> Row:
        raise RuntimeError("always")

    bench = runner(tmp_path, watcher=(told := Told()))
    bench.measure([Case({"n": 1}, at_times, group="g"), case("b", log, "g"), Case({"n": 2}, never)])
    first, second, third = read_run(bench.path).rows
    assert first.status == MEASURED and first.samples["seconds"] == [1.0]
    assert first.note == "after 1 samples: UserError: no room at all"
    assert len(second.samples["seconds"]) == 3, "the others go on"
    assert (third.status, third.note) == (SKIPPED, "RuntimeError: always") and len(told.rows) == 3


def test_mistakes_of_the_benchmark_itself_are_not_rows(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        runner(tmp_path).measure([Case({"n": 1}, lambda: Row(values={"x": 1 / 0}))])


def test_what_finds_no_time_is_left_out(tmp_path: Path):
    log: list[str] = []
    bench = runner(tmp_path, until=time.monotonic() + 50)
    bench.measure([case("a", log, needs=99), case("b", log, "g", needs=30), case("c", log, "h", needs=20)])
    bench.until = 0.0
    bench.measure([case("d", log)])
    notes = {row.what["format"]: row.note for row in bench.run.rows}
    assert "s, it needs 99 s" in notes["a"] and "it needs 60 s" in notes["b"], "two turns at least"
    assert notes["c"] == "" and notes["d"] == f"{LACK}: 0 s, it needs 0 s or more"
    (said,) = (part for part in tables(bench.run) if "left out" in str(part))
    assert said == f"left out: a; b; d: {LACK}"
    assert log == ["a closed", "b closed", "c", "c", "c", "c closed", "d closed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_it_keeps_what_there_is(tmp_path: Path, error: type[BaseException]):
    log: list[str] = []

    def stop() -> Row:
        if "stopping" in log:
            raise error
        log.append("stopping")
        return Row(samples={"seconds": [1.0]})

    bench = runner(tmp_path)
    with pytest.raises(error):
        bench.measure(
            [case("a", log, "g"), case("c", log, "h"), Case({"format": "d"}, stop, group="h"), case("e", log)]
        )
    rows = {row.what["format"]: row for row in read_run(bench.path).rows}
    assert set(rows) == {"a", "c", "d"} and len(rows["a"].samples["seconds"]) == 3 and rows["a"].note == ""
    assert rows["d"].note == "interrupted after 1 samples" and len(rows["c"].samples["seconds"]) == 1
    assert log[-1] == "c closed"


def test_a_run_that_has_nothing_yet_replaces_nothing(tmp_path: Path):
    def stop() -> Row:
        raise KeyboardInterrupt

    bench = runner(tmp_path)
    bench.path.write_text("of this morning")
    with pytest.raises(KeyboardInterrupt):
        bench.measure([Case({"n": 1}, stop), case("a", [])])
    assert bench.path.read_text() == "of this morning"


def test_a_resumed_run_measures_what_is_missing(tmp_path: Path):
    log: list[str] = []
    bench = runner(tmp_path)
    bench.measure([case("a", log), case("b", log, "g")])
    bench.run.rows.append(Row({"format": "d"}, status=SKIPPED, note="no time"))
    log.clear()
    again = runner(tmp_path, resume=True)
    again.run.rows = bench.run.rows
    again.measure([case("a", log), case("b", log, "g"), case("c", log, "g"), case("d", log)])
    assert [name for name in log if "closed" not in name] == list("bccbbcd"), "a group is measured as a whole"
    assert log[0] == "a closed"
    assert [row.what["format"] for row in again.run.rows] == ["a", "b", "d", "c"] and again.run.rows[2].note == ""


def test_a_row_that_was_measured_is_not_lost_for_want_of_time(tmp_path: Path):
    log: list[str] = []
    bench = runner(tmp_path)
    bench.measure([case("a", log, "g")])
    later = runner(tmp_path, until=0.0)
    later.run.rows = bench.run.rows
    later.measure([case("a", log, "g"), case("b", log, "g")])
    assert [row.status for row in later.run.rows] == [MEASURED, SKIPPED]


# --- Rows and files ---------------------------------------------------------------------------------------------------


def test_a_row_says_how_to_measure_it_again(tmp_path: Path):
    bench = runner(tmp_path, base="flux-quant bench step --random")
    what = {"format": "q8_0", "vram": 8 * 10**9, "size": "512x512", "steps": 4, "words": 3}
    expected = "flux-quant bench step --random --formats q8_0 --vram 8GB --size 512x512 --steps 4"
    assert bench.rerun(Case(what, Row)) == expected
    assert bench.rerun(Case({"vram": None}, Row)) == "flux-quant bench step --random"


UNSTABLE = {
    "quiet": ([1.0, 1.02, 0.99, 1.01, 1.0], False),
    "wide": ([1.0, 1.3, 0.8, 1.2, 1.0], True),
    "one far out": ([1.0, 1.0, 1.01, 1.0, 2.5], True),
    "too few to tell": ([1.0, 3.0], False),
    "none": ([], False),
}


@pytest.mark.parametrize(("samples", "unstable"), UNSTABLE.values(), ids=UNSTABLE)
def test_rows_that_scatter_are_marked(samples: list[float], unstable: bool):
    row = Row({"format": "q8_0"}, samples={"seconds": samples})
    assert bool(row.unstable()) == unstable and ("~" in line(row)) == unstable
    run = Run("it", "", "2026-01-02", {}, {}, rows=[row])
    assert any("1 of 1 rows scatter" in str(part) for part in tables(run)) == unstable


def test_a_run_survives_its_file(tmp_path: Path):
    rows = [
        Row({"format": "q8_0", "vram": None}, samples={"seconds": [1.0, 2.0]}, memory={"host_rss": 5}, note="a"),
        Row({"format": "é"}, "peer 1.0", values={"wrong": False, "ratio": 0.1}, expected={"bound_by": "copy"}),
    ]
    run = Run("it", "flux-quant bench it", "2026-01-02", {"kind": "random"}, {"device": "x"}, {"gb": [1.5]}, rows)
    path = tmp_path / slug("NVIDIA H200 NVL") / "it.json"
    write_run(run, path)
    assert read_run(path) == run and not list(path.parent.glob("*.tmp")) and path.parent.name == "nvidia-h200-nvl"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "rows": [{"where": 1}]}'])
def test_other_files_are_refused(content: str, tmp_path: Path):
    path = tmp_path / "it.json"
    path.write_text(content)
    with pytest.raises(UserError, match="it.json"):
        read_run(path)


# --- Sessions ---------------------------------------------------------------------------------------------------------


def suite_of(*cases: Case) -> Suite:
    return Suite("it", "for a test", lambda asked: cases)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is not measured."""
    monkeypatch.setattr(session.limits, "measure", lambda *_: {"ram_copy_gb_per_s": 8.0})
    monkeypatch.setattr(session, "fingerprint", lambda: dict(MACHINE))


MACHINE = {"device": "CPU x", "commit": "abc", "torch": "2", "threads": 1, "date": "2026-01-02T03:04:05+00:00"}


def test_a_session_writes_a_file_per_suite_and_resumes_it(tmp_path: Path, still: None, monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    suites = [suite_of(case("a", log))]
    made = session.Session(Asked(quick=True), tmp_path, 60.0, note="beside other work")
    ((run, path),) = made.run(suites)
    assert path.name == "2026-01-02-it-quick.json" and path.parent.parent == tmp_path
    assert run.machine["note"] == "beside other work" and run.limits == {"ram_copy_gb_per_s": 8.0}
    assert run.weights["kind"] == "shipped" and len(run.weights["sha256"]) == 64
    again = replace(made, resume=True)
    ((run, _),) = again.run(suites)
    assert log.count("a") == 1 and len(run.rows) == 1
    monkeypatch.setattr(session, "fingerprint", lambda: MACHINE | {"commit": "def"})
    list(again.run(suites))
    assert log.count("a") == 2, "rows of another commit are not kept"
    ((_, other),) = session.Session(Asked(random=True), tmp_path, 60.0).run(suites)
    assert other.name == "2026-01-02-it-random.json"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run begins an hour after the one before."""
    hours = iter(range(24))
    monkeypatch.setattr(session, "now", lambda: f"2026-01-02T{next(hours):02}:04:05+00:00")


def asked_again(folder: Path, names: str, resume: bool = False, limit: float = 60.0) -> tuple[Run, Path]:
    made = session.Session(Asked(), folder, limit, resume)
    ((run, path),) = made.run([suite_of(*(case(name, []) for name in names))])
    return run, path


def files_in(folder: Path) -> dict[str, str]:
    return {
        path.name: "".join(row.what["format"] for row in read_run(path).rows if row.status == MEASURED)
        for path in folder.glob("*/*")
    }


def test_a_run_replaces_only_a_file_of_the_day_that_holds_no_more(tmp_path: Path, still: None, clock: None):
    asked_again(tmp_path, "ab")
    asked_again(tmp_path, "bac")
    assert files_in(tmp_path) == {"2026-01-02-it.json": "bac"}
    _, path = asked_again(tmp_path, "ad")
    left = {"2026-01-02-it.json": "bac", "2026-01-02T020405-it.json": "ad"}
    assert files_in(tmp_path) == left and path.name == "2026-01-02T020405-it.json"
    asked_again(tmp_path, "abc", limit=-1.0)
    assert files_in(tmp_path) == left | {"2026-01-02T030405-it.json": ""}, "rows without time replace none"
    assert files_in(tmp_path)["2026-01-02-it.json"] == "bac"


def test_a_run_leaves_results_of_scripts_alone(tmp_path: Path, still: None, clock: None):
    _, path = asked_again(tmp_path, "a")
    path.write_text('{"suite": "it", "machine": {}, "rows": []}')
    assert asked_again(tmp_path, "a")[1].name == "2026-01-02T010405-it.json"
    assert "schema" not in json.loads(path.read_text())


def test_the_last_run_of_a_day_is_resumed(tmp_path: Path, still: None, clock: None, monkeypatch: pytest.MonkeyPatch):
    asked_again(tmp_path, "ab")
    monkeypatch.setattr(session, "fingerprint", lambda: MACHINE | {"commit": "def"})
    asked_again(tmp_path, "b")
    assert files_in(tmp_path) == {"2026-01-02-it.json": "ab", "2026-01-02T010405-it.json": "b"}
    run, path = asked_again(tmp_path, "ab", resume=True)
    assert [row.what["format"] for row in run.rows] == ["b", "a"] and path.name == "2026-01-02-it.json"
    assert files_in(tmp_path) == {"2026-01-02-it.json": "ba"}, "it has all that the first one had"


def test_weights_of_a_file_are_told_by_their_content(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    found = models.weights_of(Asked(model=file))
    assert found["kind"] == "file" and found["bytes"] == 7
    assert found["sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_suite_has_its_share_of_the_time(tmp_path: Path, still: None):
    shares = []

    def cases(asked: Asked) -> list[Case]:
        shares.append(asked.seconds)
        return []

    list(session.Session(Asked(), tmp_path, 100.0).run([Suite(name, "", cases) for name in "abcd"]))
    assert shares[0] == pytest.approx(25, abs=5) and shares[-1] == pytest.approx(100, abs=5)


def test_one_of_many_suites_that_has_nothing_to_measure_says_why(tmp_path: Path, still: None):
    def cases(asked: Asked) -> list[Case]:
        raise UserError("no T5 here")

    log: list[str] = []
    lacking = Suite("lacking", "", cases, cases)
    runs = [run for run, _ in session.Session(Asked(), tmp_path, 60.0).run([lacking, suite_of(case("a", log))])]
    assert [(row.status, row.note) for row in runs[0].rows] == [(SKIPPED, "no T5 here")] and "a" in log
    with pytest.raises(UserError, match="no T5 here"):
        list(session.Session(Asked(), tmp_path, 60.0).run([lacking]))


def test_an_interrupted_bench_exits_with_130(tmp_path: Path, still: None, monkeypatch: pytest.MonkeyPatch, capsys):
    def stop() -> Row:
        raise KeyboardInterrupt

    log: list[str] = []
    monkeypatch.setattr(session, "suite_named", lambda name: suite_of(case("a", log), Case({"n": 2}, stop)))
    assert main(["bench", "tiers", "--quick", "-o", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*/*.json")
    assert [row["what"] for row in json.loads(path.read_text())["rows"]] == [{"format": "a"}]
    assert "interrupted" in capsys.readouterr().err


def test_a_listing_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "step", "image", "kernels", "--list", "--formats", "q4_0,q8_0", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("q4_0") >= 4 and "steps 3" in out and not list(tmp_path.iterdir())
