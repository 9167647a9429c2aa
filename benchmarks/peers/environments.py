"""Every peer lives in an environment of its own, so that what one needs is nobody else's concern.

    python -I -m flux_quant.benchmarks.peers.environments optimum-quanto     # makes it
    python -I -m flux_quant.benchmarks.peers.environments                    # lists them

An environment is a venv under the cache folder (FLUX_QUANT_CACHE names another place) with the peer's packages in it,
which sees the packages of the present environment behind its own: torch is the same for all and not installed again,
unless a peer insists on another version. Peers without packages of their own run in the present environment, and so
do those that have no environment but are installed here.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flux_quant.benchmarks.peers.catalogue import PEERS, Peer
from flux_quant.errors import UserError
from flux_quant.kernels.tables import cache_folder

MODULE = "flux_quant.benchmarks.peers.environments"
NOTE = "peer.json"  # inside an environment that is complete: the version of its peer


def folder_of(peer: Peer) -> Path:
    return cache_folder() / "peers" / peer.name


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def own_version(peer: Peer) -> str | None:
    """What is in the peer's own environment; None where there is none."""
    note = folder_of(peer) / NOTE
    return json.loads(note.read_text())["version"] if peer.packages and note.exists() else None


def installed(peer: Peer) -> str | None:
    """The peer's version where it can be run, in its own environment or the present one; else None."""
    try:
        return own_version(peer) or version(peer.distribution)
    except PackageNotFoundError:
        return None


def interpreter(peer: Peer) -> str:
    """The Python that runs a peer. UserError that says what to do where there is none."""
    if installed(peer) is None:
        remedy = f"python -I -m {MODULE} {peer.name}" if peer.packages else f"pip install {peer.distribution}"
        raise UserError(f"{peer.distribution} is not installed: {remedy}")
    return str(python_of(folder_of(peer))) if own_version(peer) else sys.executable


def make(peer: Peer) -> str:
    """Make or replace its environment -> the version that is in it. UserError where tools are missing or pip fails."""
    missing = [tool for tool in peer.tools if shutil.which(tool) is None]
    if missing:
        raise UserError(f"{peer.name} is built from source, which takes {' and '.join(missing)}")
    folder = folder_of(peer)
    subprocess.run([sys.executable, "-I", "-m", "venv", "--clear", str(folder)], check=True)
    python = str(python_of(folder))
    site = subprocess.run(
        [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    places = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    Path(site, "present.pth").write_text("\n".join(places) + "\n")
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", *peer.packages]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise UserError(f"{' '.join(peer.packages)} could not be installed; pip says why above")
    code = f"from importlib.metadata import version; print(version({peer.distribution!r}))"
    found = subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    (folder / NOTE).write_text(json.dumps({"version": found}) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="peers; none: list them, `all`: those without one")
    args = parser.parse_args()
    own = [name for name, peer in PEERS.items() if peer.packages]
    names = [name for name in own if installed(PEERS[name]) is None] if args.names == ["all"] else args.names
    try:
        for name in names:
            if name not in own:
                raise UserError(f"there is no environment for {name}; there are {', '.join(own)}")
            print(f"{name} {make(PEERS[name])} in {folder_of(PEERS[name])}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not args.names:
        for name, peer in PEERS.items():
            print(f"{name:24} {installed(peer) or 'not installed':14} {peer.about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
