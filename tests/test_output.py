"""A file appears complete or not at all, and interrupted work can be taken up again."""

import os
import signal
from pathlib import Path

import pytest

from flux_quant.converters.output import OutputFile
from flux_quant.errors import UserError

CHUNKS = {"a": (0, b"first"), "b": (5, b"second"), "c": (11, b"third")}
SIZE = 16


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(file: OutputFile, *chunks: str) -> None:
    for name in chunks:
        file.write(*CHUNKS[name])
        file.finish({name: len(name)})


def interrupted(path: Path, *chunks: str, fingerprint: str = "work", error: type[BaseException] = KeyboardInterrupt):
    with pytest.raises(error), OutputFile(path, SIZE, force=True, fingerprint=fingerprint) as file:
        write(file, *chunks)
        raise error


def test_published_when_all_went_well(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with OutputFile(path, SIZE, force=True) as file:
        write(file, *CHUNKS)
        assert path.read_text() == "old"
    assert path.read_bytes() == b"firstsecondthird" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("fingerprint", ["", "work"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UserError])
def test_only_resumable_work_leaves_something(tmp_path, fingerprint, error):
    path = tmp_path / "out"
    path.write_text("old")
    interrupted(path, "a", fingerprint=fingerprint, error=error)
    kept = fingerprint and error is not UserError
    assert names(tmp_path) == ([".out.journal", ".out.part", "out"] if kept else ["out"])
    assert path.read_text() == "old"


def test_resumed_work_keeps_what_is_finished(tmp_path):
    path = tmp_path / "out"
    interrupted(path, "a", "b")
    with OutputFile(path, SIZE, fingerprint="work") as file:
        assert file.finished == {"a": 1, "b": 1}
        write(file, "c")
    assert path.read_bytes() == b"firstsecondthird" and names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda part, journal: journal.unlink(),
        lambda part, journal: journal.write_text("not JSON\n"),
        lambda part, journal: journal.write_text('"other work"\n{"a": 1}\n'),
        lambda part, journal: os.truncate(part, 3),
        lambda part, journal: part.unlink(),
    ],
    ids=["no journal", "damaged journal", "journal of other work", "short file", "no file"],
)
def test_other_leftovers_are_written_over(tmp_path, damage):
    path = tmp_path / "out"
    interrupted(path, "a", "b")
    damage(tmp_path / ".out.part", tmp_path / ".out.journal")
    with OutputFile(path, SIZE, fingerprint="work") as file:
        assert not file.finished
        write(file, *CHUNKS)
    assert path.read_bytes() == b"firstsecondthird" and names(tmp_path) == ["out"]


def test_a_line_that_was_cut_off_does_not_count(tmp_path):
    path = tmp_path / "out"
    interrupted(path, "a", "b")
    journal = tmp_path / ".out.journal"
    journal.write_text(journal.read_text()[:-4])
    with OutputFile(path, SIZE, fingerprint="work") as file:
        assert file.finished == {"a": 1}
        write(file, "b", "c")
    assert path.read_bytes() == b"firstsecondthird"


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "out"
    with OutputFile(path, SIZE) as file:
        with pytest.raises(UserError, match="another process is writing"), OutputFile(path, SIZE):
            pass
        write(file, *CHUNKS)
    assert path.read_bytes() == b"firstsecondthird" and names(tmp_path) == ["out"]


KILLED = """
import sys, time
from pathlib import Path
from flux_quant.converters.output import OutputFile
with OutputFile(Path(sys.argv[1]), 16, True, sys.argv[2]) as file:
    file.write(0, b"first")
    file.finish({"a": 1})
    print("middle", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("fingerprint", ["", "work"])
def test_killed(tmp_path, start, fingerprint):
    """kill -9: the old file stays; the next process takes the leftover's place, or goes on with it."""
    path = tmp_path / "out"
    path.write_text("old")
    process = start("-c", KILLED, str(path), fingerprint)
    assert process.stdout.readline() == "middle\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old"
    with OutputFile(path, SIZE, force=True, fingerprint=fingerprint) as file:
        assert file.finished == ({"a": 1} if fingerprint else {})
        write(file, *(name for name in CHUNKS if name not in file.finished))
    assert path.read_bytes() == b"firstsecondthird" and names(tmp_path) == ["out"]
