"""The verb `install-comfyui`: links and loaders, twice, over something else, and out again."""

import subprocess
import sys
from pathlib import Path

import pytest

import flux_quant
from flux_quant.cli import main
from flux_quant.verbs import comfyui

PACK = Path(flux_quant.__file__).parent / "frontends/comfyui"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a ComfyUI looks like from outside."""
    for name in ("comfy", "custom_nodes"):
        (tmp_path / name).mkdir()
    for name in ("main.py", "nodes.py"):
        (tmp_path / name).touch()
    return tmp_path


def install(folder: Path, *options: str) -> int:
    return main(["install-comfyui", str(folder), *options])


def place(folder: Path) -> Path:
    return folder / "custom_nodes" / comfyui.NAME


@pytest.mark.parametrize("options", [[], ["--copy"]], ids=["link", "loader"])
def test_in_and_out(folder, capsys, options):
    assert install(folder, *options) == 0
    found = place(folder)
    assert found.is_symlink() == (not options) and str(found) in capsys.readouterr().out
    assert {path.name for path in (found / "workflows").iterdir()} == {p.name for p in (PACK / "workflows").iterdir()}
    before = (found / "__init__.py").stat()
    assert install(folder, *options) == 0 and "already" in capsys.readouterr().out
    assert (found / "__init__.py").stat().st_mtime_ns == before.st_mtime_ns
    assert install(folder, "--uninstall") == 0 and "gone" in capsys.readouterr().out
    assert list((folder / "custom_nodes").iterdir()) == [] and (PACK / "__init__.py").exists()
    assert install(folder, "--uninstall") == 0 and "was not there" in capsys.readouterr().out


def test_from_a_link_to_a_loader_and_back(folder):
    for options in ([], ["--copy"], []):
        assert install(folder, *options) == 0
        assert place(folder).is_symlink() == (not options)


def test_what_is_stale_is_made_anew(folder, capsys):
    assert install(folder, "--copy") == 0
    (place(folder) / "workflows/kontext.json").write_text("{}")
    assert install(folder, "--copy") == 0 and "already" not in capsys.readouterr().out
    assert (place(folder) / "workflows/kontext.json").read_bytes() == (PACK / "workflows/kontext.json").read_bytes()
    install(folder, "--uninstall")
    place(folder).symlink_to(folder / "gone/flux_quant/frontends/comfyui")
    assert install(folder) == 0 and place(folder).resolve() == PACK.resolve()


@pytest.mark.parametrize("options", [[], ["--copy"], ["--uninstall"]])
def test_things_of_others_stay(folder, capsys, options):
    place(folder).mkdir()
    (place(folder) / "__init__.py").write_text("mine = 1\n")
    assert install(folder, *options) == 2
    assert "not from this command" in capsys.readouterr().err
    assert (place(folder) / "__init__.py").read_text() == "mine = 1\n"


@pytest.mark.parametrize("name", comfyui.SIGNS)
def test_a_folder_that_is_no_comfyui(folder, capsys, name):
    gone = folder / name
    gone.rmdir() if gone.is_dir() else gone.unlink()
    assert install(folder) == 2
    assert f"there is no {name}" in capsys.readouterr().err and not place(folder).exists()


def test_where_no_link_can_be_made(folder, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1314, "no privilege")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert install(folder) == 0 and not place(folder).is_symlink() and "no privilege" in capsys.readouterr().err


def test_the_loader_says_what_is_missing(folder):
    """As ComfyUI runs it: under a name of its own, by path."""
    assert install(folder, "--copy") == 0
    code = (
        "import importlib.util as u, sys; "
        "s = u.spec_from_file_location('x', sys.argv[1], submodule_search_locations=[]); "
        "s.loader.exec_module(u.module_from_spec(s))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(place(folder) / "__init__.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "only ComfyUI can import" in done.stderr.splitlines()[-1]
