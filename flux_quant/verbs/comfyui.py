"""The verb `install-comfyui`: the node pack into a ComfyUI, and out of it. `cli` registers it."""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from flux_quant.errors import UserError

NAME = "ComfyUI-flux-quant"  # of the folder in custom_nodes
SIGNS = ("main.py", "nodes.py", "comfy", "custom_nodes")  # what every ComfyUI has
LOADER = '''"""Written by `flux-quant install-comfyui`: the nodes are those of the installed flux_quant."""

from flux_quant.frontends.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''
MARK = LOADER.partition("\n")[0]

ComfyFolder = Annotated[Path, typer.Argument(metavar="DIR", help="the folder of ComfyUI, with its main.py")]
Copy = Annotated[bool, typer.Option("--copy", help="write a loader instead of a link (always on Windows)")]
Uninstall = Annotated[bool, typer.Option("--uninstall", help="take the node pack out again")]


def register(app: typer.Typer) -> None:
    app.command("install-comfyui")(install)


def install(folder: ComfyFolder, copy: Copy = False, uninstall: Uninstall = False) -> None:
    """Put the node pack into ComfyUI's custom_nodes, as a link or a small loader; --uninstall takes it out."""
    if missing := [name for name in SIGNS if not (folder / name).exists()]:
        raise UserError(f"{folder} is no ComfyUI: there is no {missing[0]} in it")
    place = folder / "custom_nodes" / NAME
    if uninstall:
        print(taken_out(place))
        return
    print(put_in(place, copy or sys.platform == "win32"))
    print(
        f"start ComfyUI with a Python that has flux_quant, such as {sys.executable}; workflows: {pack() / 'workflows'}"
    )


def pack() -> Path:
    import flux_quant

    return Path(flux_quant.__file__).parent / "frontends" / "comfyui"


def put_in(place: Path, copy: bool) -> str:
    """What was done. UserError if something of another origin is there."""
    if exists(place):
        if not ours(place):
            raise UserError(f"{place} is not from this command; move it away first")
        if place.is_symlink() != copy and same(place):
            return f"{place}: is there already"
        remove(place)
    if not copy:
        try:
            place.symlink_to(pack(), target_is_directory=True)
        except OSError as error:
            print(f"no link can be made here ({error.strerror}); a loader is written instead", file=sys.stderr)
        else:
            return f"{place}: a link to {pack()}"
    write_loader(place)
    return f"{place}: a loader of the installed flux_quant"


def write_loader(place: Path) -> None:
    """With the workflows, which ComfyUI shows as templates. All of it or nothing."""
    beside = place.with_name(f".{NAME}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    (beside / "__init__.py").write_text(LOADER, encoding="utf-8")
    shutil.copytree(pack() / "workflows", beside / "workflows")
    os.replace(beside, place)


def taken_out(place: Path) -> str:
    if not exists(place):
        return f"{place}: was not there"
    if not ours(place):
        raise UserError(f"{place} is not from this command; it stays")
    remove(place)
    return f"{place}: is gone"


def exists(place: Path) -> bool:
    return place.is_symlink() or place.exists()


def ours(place: Path) -> bool:
    """A link into some flux_quant, broken or not, or a loader of this command."""
    if place.is_symlink():
        return Path(os.readlink(place)).parts[-2:] == ("frontends", "comfyui")
    start = place / "__init__.py"
    return start.is_file() and start.read_text(encoding="utf-8", errors="replace").startswith(MARK)


def same(place: Path) -> bool:
    """As it would be made now."""
    if place.is_symlink():
        return place.resolve() == pack().resolve()
    names = {path.relative_to(pack()): path.read_bytes() for path in (pack() / "workflows").rglob("*.json")}
    found = {path.relative_to(place): path.read_bytes() for path in (place / "workflows").rglob("*.json")}
    return names == found and (place / "__init__.py").read_text(encoding="utf-8") == LOADER


def remove(place: Path) -> None:
    if place.is_symlink():
        place.unlink()
    else:
        shutil.rmtree(place)
