"""What a result says of files: those of the repository by their path in it, others by their name alone.

Results are committed and sent around. Folders say nothing of a measurement, but much of whose machine it was.
"""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ("--output", "-o", "--out")  # says where a result goes, nothing of how it came about
FILES = ("--model", "-m")
ENDS = r"\s'\"<>|,;:()\[\]{}"  # characters that no path in a message goes on behind
PATH = re.compile(
    rf"(?P<url>\b(?:https?|git|ssh)://[^{ENDS}]*)"
    rf"|(?<![\w.*)\]}}/\\~])(?:file://)?(?:~?/|[A-Za-z]:[\\/])(?P<path>[^{ENDS}\\/](?:[^{ENDS}])+)"
)


def shown(path: str | Path) -> str:
    """Of a file that was given: from the root of the repository on, or its name."""
    absolute = Path(path).expanduser().resolve()
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else absolute.name


def told(text: str) -> str:
    """Of a message: absolute paths in it as `shown` does, and addresses of the web as they are."""
    text = text.replace(f"{ROOT}{os.sep}", "").replace(f"{os.path.expanduser('~')}{os.sep}", f"~{os.sep}")
    return PATH.sub(lambda found: found["url"] or re.split(r"[\\/]", found["path"].rstrip("\\/"))[-1], text)


def cleaned(content: Any) -> Any:
    """Nested dictionaries and lists with every word `told`."""
    if isinstance(content, dict):
        return {name: cleaned(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [cleaned(value) for value in content]
    return told(content) if isinstance(content, str) else content


def command(arguments: Sequence[str], program: Sequence[str] = ("flux-quant",)) -> str:
    """The command of these arguments of a program, without where its output goes."""
    kept, rest = [*program], iter(arguments)
    for argument in rest:
        name, joined, value = split(argument)
        if name in OUTPUT:
            if not joined:
                next(rest, None)
        elif name in FILES:
            kept += [name, shown(value if joined else next(rest, ""))]
        else:
            kept.append(told(argument))
    return shlex.join(kept)


def split(argument: str) -> tuple[str, bool, str]:
    """An option and the value that is written in one with it: --output=x, -ox."""
    if argument.startswith("--"):
        name, joined, value = argument.partition("=")
        return name, bool(joined), value
    short = argument[:2]
    known = short in (*OUTPUT, *FILES)
    return (short, len(argument) > 2, argument[2:]) if known else (argument, False, "")
