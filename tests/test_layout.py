"""Who may import whom, which library is imported where, and that importing has no effects."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"flux_quant": "flux_quant", "kernels": "flux_quant.kernels", "converters": "flux_quant.converters"}
FOLDERS |= {"benchmarks": "flux_quant.benchmarks"}

# A room imports rooms above its own line here, and itself. Rooms of one line do not know each other.
LAYERS = (
    {"errors", "codecs"},
    {"formats", "layouts"},
    {"naming"},
    {"arch", "families"},
    {"configs"},
    {"kernels", "streaming"},
    {"adapters"},
    {"linear", "converters"},
    {"side_paths"},
    {"lora", "model", "embedding"},
    {"modulation"},
    {"controlnet"},
    {"loading"},
    {"drawing"},
    {"planner"},
    {"runtime", "components"},
    {"text"},
    {"placing"},
    {"generation"},
    {"calibration"},
    {"console"},
    {"frontends"},
    {"benchmarks"},
    {"verbs"},
    {"cli"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
ONLY = {"streaming": {"errors"}}  # moves buffers and knows nothing of what they hold
STRANGERS = {("cli", "frontends")}  # two doors to the same house

LIBRARIES = {  # library -> where it may be imported
    "triton": "flux_quant.kernels",
    "numba": "flux_quant.kernels",
    "gguf": "flux_quant.converters.gguf_io",
    "safetensors": "flux_quant.converters.safetensors_io",
    "sentencepiece": "flux_quant.converters.t5_tokenizer",
    "comfy": "flux_quant.frontends.comfyui",
    "folder_paths": "flux_quant.frontends.comfyui",
}
RUNNERS = "flux_quant.benchmarks.peers.runners"
RIVALS = {  # what a benchmark measures itself against
    ("flux_quant.benchmarks.bench.kernels", "gguf"),
    *((f"{RUNNERS}.{runner}", "gguf") for runner in ("diffusers_gguf", "ggml", "gguf_py")),
    *((f"{RUNNERS}.{runner}", "safetensors") for runner in ("ggml", "gguf_py")),
}
LAZY = {"diffusers", "transformers", "accelerate"}  # slow to import: inside functions, from `model` upwards
FREE = "flux_quant.benchmarks.tiny_flux"  # training scripts, outside the product
GUEST = "flux_quant.frontends.comfyui"  # imported by ComfyUI alone, see test_comfyui.py


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    in_function: bool
    for_types: bool  # under `if TYPE_CHECKING`: never executed


def all_modules() -> dict[str, Path]:
    """Module name -> file, for everything that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, in_function, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, in_function, for_types)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types |= isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function, for_types)

    return tuple(walk(ast.parse(path.read_text()), False, False))


def room_of(module: str) -> str | None:
    """`kernels` for flux_quant.kernels.dispatch.linear; None for the package itself and for other libraries."""
    top, _, rest = module.partition(".")
    room = rest.split(".")[0]
    return room if top == "flux_quant" and room and not room.startswith("__") else None


MODULES = all_modules()
modules = pytest.mark.parametrize(("module", "path"), MODULES.items(), ids=MODULES)


@modules
def test_imports_point_down(module, path):
    own = room_of(module)
    if own is None:
        ours = [found for found in imports_of(path) if not found.module.startswith("typing.")]
        assert all(found.in_function or found.for_types for found in ours), "`import flux_quant` loads nothing"
        return
    assert own in RANK, f"{own} has no place in LAYERS"
    for found in imports_of(path):
        other = room_of(found.module)
        if other is None or other == own:
            continue
        assert other in RANK, f"{path}:{found.line}: {other} has no place in LAYERS"
        assert RANK[other] < RANK[own], f"{path}:{found.line}: {own} may not know {other}"
        known = other in ONLY.get(own, {other}) and (own, other) not in STRANGERS
        assert known, f"{path}:{found.line}: {own} may not know {other}"


@modules
def test_libraries_are_imported_in_their_place(module, path):
    if module.startswith(FREE):
        pytest.skip("training scripts import what they like")
    for found in imports_of(path):
        library = found.module.split(".")[0]
        place = LIBRARIES.get(library, module)
        at_home = f"{module}.".startswith(f"{place}.") or (module, library) in RIVALS
        assert at_home, f"{path}:{found.line}: {library} belongs in {place}"
        if library in LAZY and not found.for_types:
            assert found.in_function, f"{path}:{found.line}: import {library} inside the function that needs it"
            assert RANK[room_of(module)] >= RANK["model"], f"{path}:{found.line}: {module} may not know {library}"
        assert library not in FOLDERS or library == "flux_quant", f"{path}:{found.line}: flux_quant.{library} is meant"


@pytest.mark.parametrize("folder", ["kernels", "converters", "benchmarks"])
def test_init_is_a_docstring_only(folder):
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)


def test_setup_lists_every_package():
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    listed = next(ast.literal_eval(k.value) for call in calls for k in call.keywords if k.arg == "packages")
    folders = {path.parent for path in MODULES.values()}
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert set(listed) == {module for module, path in MODULES.items() if path.name == "__init__.py"}


def test_our_kernels_are_not_the_library_of_that_name():
    """diffusers and transformers look for a library `kernels`; they must not find our folder."""
    for name in ("kernels", "converters", "benchmarks"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
        assert ROOT / name not in places, "run `pytest`, not `python -m pytest`, which puts this folder on sys.path"
    assert not list(ROOT.glob("conftest.py")) and not (ROOT / "tests" / "__init__.py").exists()


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in an interpreter that does not see the current directory."""
    return subprocess.run([sys.executable, "-I", "-B", *options, "-c", code], capture_output=True, text=True)


WITHOUT_EFFECTS = """
import importlib, os, sys
import torch, numpy, gguf, safetensors

def refuse(*args, **kwargs):
    raise RuntimeError("a device was touched")

FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.putenv", "os.mkdir", "os.remove"}

def watch(event, args):
    if event in FORBIDDEN or event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise RuntimeError(f"{event} {args}")

torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
sys.addaudithook(watch)
for module in MODULES:
    importlib.import_module(module)
assert not torch.cuda.is_initialized()
"""


def lacks_triton(path: Path) -> bool:
    """Kernels that import triton at their top, where it is not installed."""
    at_top = {found.module.split(".")[0] for found in imports_of(path) if not found.in_function}
    return "triton" in at_top and importlib.util.find_spec("triton") is None


def test_importing_touches_nothing():
    """No device, network, environment variable, process or written file; of all modules but the training scripts."""
    names = [name for name, path in MODULES.items() if not name.startswith((FREE, GUEST)) and not lacks_triton(path)]
    done = python(WITHOUT_EFFECTS.replace("MODULES", repr(names)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["flux_quant", "flux_quant.formats", "flux_quant.linear"])
def test_import_costs_little_beyond_torch(module):
    """Nothing large is loaded that torch has not loaded already."""
    done = python(f"import torch, sys\nbefore = set(sys.modules)\nimport {module}\nprint(*(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "flux_quant" in loaded <= {"flux_quant", *sys.stdlib_module_names}


@pytest.mark.skipif("flux_quant.cli" not in MODULES, reason="no command line yet")
def test_command_line_starts_light():
    heavy = {"torch", "numpy", "numba", "triton", *LAZY, *LIBRARIES}
    done = python("import flux_quant.cli, sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not heavy & set(done.stdout.split())
