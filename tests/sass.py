"""What the compiler made of a Triton kernel, for any NVIDIA architecture, on a machine without a GPU.

`recording` runs a launcher as it is; every launch inside becomes a compilation for the architecture that was named,
with the very arguments: Triton specialises on their types, on integers equal to 1 and on divisibility by 16, and
without these a load falls to single bytes. `examine` then reads the machine code with the disassembler that lies in
Triton's own wheel.

Counts are static: instructions that stand in the main loop (or in the whole kernel, if it has none), each run by every
thread of a program. They are no timings.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARP = 32  # threads
SLOW = ("I2F", "F2F", "F2I", "MUFU")
MMA = re.compile(r"[A-Z]+MMA")  # HMMA, IMMA, QMMA and the asynchronous HGMMA, IGMMA, QGMMA
WIDTHS = ("U8", "U16", "64", "128", "256")  # modifiers of a load or store; none of them: 32 bits
LABEL = re.compile(r"(\.L\w+):$")
TARGET = re.compile(r"`\((\.L\w+)\)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)(.*)")


class Unreadable(Exception):
    """The tools of this version of Triton do not know the architecture: those of CUDA 13.1 have forgotten sm_61."""


@dataclass(frozen=True)
class Launch:
    """One launch as the launcher asked for it, compiled."""

    kernel: str
    arguments: dict[str, object]  # by name, the compile-time ones included; tensors are left out
    grid: tuple[int, ...]
    threads: int  # of a program
    shared_bytes: int
    cubin: bytes


@dataclass(frozen=True)
class Report:
    """Of one compiled kernel. `loads`, `mmas` and `instructions` are of the main loop, the rest of the whole kernel."""

    registers: int
    stack_bytes: int
    local: int  # loads and stores of local memory: spilled registers
    loads: Counter[str]  # global loads by width: U8, U16, 32, 64, 128; copies to shared memory included; TMA: a tile
    stores: Counter[str]  # global stores by width
    mmas: Counter[str]  # matrix instructions by name
    instructions: int  # per thread, without the matrix instructions
    conversions: int  # of these, the ones of a unit with an eighth of the rate: I2F, F2F, F2I, MUFU
    loop: bool  # whether there is a main loop


@dataclass(frozen=True)
class Instruction:
    name: str
    modifiers: tuple[str, ...]
    target: str | None  # label of a branch

    @property
    def width(self) -> str:
        if self.name.startswith("UTMA"):
            return "TMA"
        signless = {modifier.replace("S8", "U8").replace("S16", "U16") for modifier in self.modifiers}
        return next((width for width in WIDTHS if width in signless), "32")

    @property
    def is_load(self) -> bool:
        return self.name in ("LDG", "LDGSTS", "LD", "UTMALDG")

    @property
    def is_mma(self) -> bool:
        return bool(MMA.fullmatch(self.name))


class Pointer:
    """Stands for a tensor in a launch: Triton asks for its type and whether its address is a multiple of 16."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self.address = tensor.storage_offset() * tensor.dtype.itemsize

    def data_ptr(self) -> int:
        return self.address


class CompileOnly:
    """A driver for a GPU that is not there. The architecture serves as device number, so each has its own cache."""

    def __init__(self, cc: int):
        self.cc = cc

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, WARP)

    def get_current_device(self) -> int:
        return self.cc

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(cc: int) -> Iterator[list[Launch]]:
    """Compile every launch inside for compute capability `cc` (90 for 9.0) instead of running it, and collect them.

    Launchers also ask torch for the capability of the tensors' device: they get `cc`. Triton's driver stays replaced: a
    process that records launches nothing afterwards.
    """
    launches, run, capability = [], JITFunction.run, torch.cuda.get_device_capability

    def compile_only(kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **options: object):
        args = [Pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        options = {key: Pointer(v) if isinstance(v, torch.Tensor) else v for key, v in options.items()}
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        grid = grid(values) if callable(grid) else grid
        values = {key: v for key, v in values.items() if key in kernel.arg_names and not isinstance(v, Pointer)}
        about = compiled.metadata
        shape = tuple(grid), about.num_warps * WARP, about.shared
        launches.append(Launch(kernel.__name__, values, *shape, compiled.asm["cubin"]))
        return compiled

    driver.set_active(CompileOnly(cc))
    JITFunction.run, torch.cuda.get_device_capability = compile_only, lambda device=None: divmod(cc, 10)
    try:
        yield launches
    finally:
        JITFunction.run, torch.cuda.get_device_capability = run, capability


def examine(cubin: bytes) -> Report:
    """Registers and memory from `cuobjdump`, instructions from `nvdisasm`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output_of("cuobjdump", "-res-usage", file.name)
        code = output_of("nvdisasm", "-c", "-ndf", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return report(code, used["REG"], used["STACK"])


def output_of(tool: str, *arguments: str) -> str:
    done = subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unreadable(done.stderr.strip())
    return done.stdout


def report(code: str, registers: int, stack_bytes: int) -> Report:
    """What stands in a listing of `nvdisasm -c` with one kernel."""
    instructions, labels = parse(code)
    span = main_loop(instructions, labels)
    inside = [one for one in instructions[span] if one.name != "NOP"]
    return Report(
        registers,
        stack_bytes,
        local=sum(one.name in ("LDL", "STL") for one in instructions),
        loads=Counter(one.width for one in inside if one.is_load),
        stores=Counter(one.width for one in instructions if one.name in ("STG", "ST")),
        mmas=Counter(one.name for one in inside if one.is_mma),
        instructions=sum(not one.is_mma for one in inside),
        conversions=sum(one.name in SLOW for one in inside),
        loop=span != slice(None),
    )


def parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions up to the end of the kernel, and the index of the instruction that follows each label."""
    instructions, labels = [], {}
    for line in map(str.strip, code.splitlines()):
        if found := LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            target = TARGET.search(found[3])
            modifiers = tuple(found[2].split(".")[1:])
            instructions.append(Instruction(found[1], modifiers, target[1] if target else None))
    # The trap behind the last instruction, a branch to itself, and its padding are never run.
    ends = [i for i, one in enumerate(instructions) if one.target and labels[one.target] == i]
    return instructions[: ends[-1]] if ends else instructions, labels


def main_loop(instructions: list[Instruction], labels: dict[str, int]) -> slice:
    """The innermost loop with most matrix instructions, or with most loads if there are none. No loop: everything."""
    loops = [
        slice(labels[one.target], i + 1)
        for i, one in enumerate(instructions)
        if one.target and one.name.startswith("BRA") and labels[one.target] < i
    ]
    work = "is_mma" if any(one.is_mma for one in instructions) else "is_load"
    amount = {(loop.start, loop.stop): sum(getattr(one, work) for one in instructions[loop]) for loop in loops}
    working = [loop for loop, count in amount.items() if count]
    inner = [
        (start, stop)
        for start, stop in working
        if not any(start <= other[0] and other[1] <= stop for other in working if other != (start, stop))
    ]
    return slice(*max(inner, key=amount.get)) if inner else slice(None)
