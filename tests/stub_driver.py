"""Triton's true launch path on a machine without a card: specialization, compilation, its C launcher, a driver library.

`launching(cc)` puts `stub_cuda.c` in the place of libcuda.so.1 and lets torch say that there are two cards of that
compute capability. Tensors on them (`empty`) have shapes, strides and addresses, and no memory, so that any size is to
be had; what torch computes with them is checked for shapes and types only. Every launch goes through all that a launch
on a card goes through, up to the call that would start it, and is checked there: the grid, threads, registers and
shared memory against the card, every parameter against what was passed, addresses against the tensors that there are,
multiples of 16 where the compiled code relies on them, tensor maps by the rules of the driver's manual.

For a process of its own, with TRITON_INTERPRET=0: see `launch_kernels.py`. One architecture per process.
"""

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

SOURCE = Path(__file__).with_name("stub_cuda.c")
STREAM = 0x5000
MOST = 64  # parameters, as in stub_cuda.c
PAGE = 2 << 20  # allocations lie so far apart: torch's own are aligned to 512 bytes


@dataclass(frozen=True)
class Card:
    """What differs between cards; sources: NVIDIA's CUDA programming guide, and the data sheets."""

    shared: int  # KiB that a program can have
    multiprocessor_shared: int  # KiB
    multiprocessors: int
    gigabytes: int


CARDS = {
    75: Card(64, 64, 30, 6),  # RTX 2060
    80: Card(163, 164, 108, 80),  # A100
    86: Card(99, 100, 28, 12),  # RTX 3060
    89: Card(99, 100, 46, 12),  # RTX 4070
    90: Card(227, 228, 132, 141),  # H200
    120: Card(99, 100, 170, 32),  # RTX 5090
}


@dataclass(frozen=True)
class Launch:
    """A launch that every check has let pass."""

    kernel: str
    arguments: dict[str, object]  # by name, tensors left out
    grid: tuple[int, int, int]
    threads: int
    shared: int
    registers: int


class Fault(Exception):
    """A launch that a card would refuse, or take wrongly."""


class LastLaunch(ctypes.Structure):
    _fields_: ClassVar = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_int),
        ("value", ctypes.c_uint64 * MOST),
        ("bytes", ctypes.c_int * MOST),
        ("count", ctypes.c_int),
    ]


class Library:
    """stub_cuda.c, compiled into `folder` and loaded as libcuda.so.1, before Triton looks for one."""

    def __init__(self, folder: Path, card: Card):
        import triton

        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        path = folder / "libcuda.so.1"
        command = [compiler(), "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", SOURCE]
        subprocess.run([*command, "-o", path], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.code = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        self.code.stub_complaint.restype = ctypes.c_char_p
        self.code.stub_registers.argtypes = [ctypes.c_uint64]
        self.code.stub_allocate.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self.code.stub_card(card.shared << 10, card.multiprocessor_shared << 10, card.multiprocessors)
        self.last = LastLaunch.in_dll(self.code, "stub_last")


def compiler() -> str:
    """The one that Triton would take. LookupError if there is none."""
    if found := os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return found
    raise LookupError("no C compiler: Triton needs one on every machine")


class Memory:
    """Addresses of tensors without memory: a fresh one for every storage, for as long as anybody holds a `Memory`."""

    def __init__(self, library: Library):
        self.library, self.storages, self.free = library, {}, 1 << 40

    def address(self, tensor: Tensor) -> int:
        with torch._C.DisableTorchFunctionSubclass():
            storage = tensor.untyped_storage()
            if not tensor.numel():
                return 0
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = self.free, storage  # held: no other storage gets its name
                if not self.library.code.stub_allocate(self.free, storage.nbytes()):
                    raise Fault("too many tensors in one case")
                self.free += -(-storage.nbytes() // PAGE) * PAGE + PAGE
            return self.storages[storage._cdata][0] + tensor.storage_offset() * tensor.element_size()

    def forget(self) -> None:
        self.storages.clear()
        self.library.code.stub_forget()


class OnCard(Tensor):
    """A tensor on the meta device that says it is on a card, and has an address there. torch works on the plain one."""

    memory: ClassVar[Memory]
    is_cuda, is_cpu, is_meta = True, False, False

    def data_ptr(self) -> int:
        return self.memory.address(self)

    @classmethod
    def __torch_function__(cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = {type(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnCard)}
        if len(found) > 1:
            raise Fault(f"{func.__name__} of tensors on two cards")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(OnCard, lambda leaf: leaf.as_subclass(Tensor), (args, kwargs or {}))
            result = func(*args, **kwargs)
            return tree_map_only(Tensor, lambda leaf: leaf.as_subclass(*found), result)


class OnFirst(OnCard):
    device = torch.device("cuda", 0)


class OnSecond(OnCard):
    device = torch.device("cuda", 1)


def is_cuda(value: object) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"


class Pretended(TorchFunctionMode):
    """Whatever is made on a CUDA device is an `OnCard`."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        places = [place for place in tree_leaves((args, kwargs)) if is_cuda(place)]
        args, kwargs = tree_map(lambda leaf: "meta" if is_cuda(leaf) else leaf, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if not places or not isinstance(result, Tensor):
            return result
        return result.as_subclass(OnSecond if torch.device(places[0]).index == 1 else OnFirst)


def empty(
    *shape: int, dtype: torch.dtype = torch.uint8, gap: int = 0, offset: int = 0, cls: type[OnCard] = OnFirst
) -> Tensor:
    """Without values, on the first card; rows `gap` elements further apart than they are long, `offset` elements after
    the start of the memory."""
    if not shape:
        return torch.empty((), dtype=dtype, device="meta").as_subclass(cls)
    *rows, width = shape
    flat = torch.empty(offset + (width + gap) * prod(rows), dtype=dtype, device="meta")[offset:]
    return flat.view(*rows, width + gap)[..., :width].as_subclass(cls)


class CurrentDevice:
    """torch.cuda.device and what belongs to it."""

    index = 0

    def __init__(self, device: object):
        device = torch.device(device) if isinstance(device, str) else device
        self.wanted = (
            device if isinstance(device, int) else CurrentDevice.index if device.index is None else device.index
        )

    def __enter__(self) -> None:
        self.before, CurrentDevice.index = CurrentDevice.index, self.wanted

    def __exit__(self, *_: object) -> None:
        CurrentDevice.index = self.before


def pretended_torch(cc: int, card: Card) -> dict[str, object]:
    """What `torch.cuda` answers."""
    properties = SimpleNamespace(
        total_memory=card.gigabytes * 10**9,
        multi_processor_count=card.multiprocessors,
        major=cc // 10,
        minor=cc % 10,
        name=f"a card of sm_{cc}",
    )
    return dict(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: CurrentDevice.index,
        device=CurrentDevice,
        get_device_capability=lambda device=None: divmod(cc, 10),
        get_device_properties=lambda device=None: properties,
        get_device_name=lambda device=None: properties.name,
        current_stream=lambda device=None: SimpleNamespace(cuda_stream=STREAM),
        is_current_stream_capturing=lambda: False,
    )


def checked_launcher(library: Library, launches: list[Launch]) -> type:
    """Triton's launcher, which looks at what arrived after each launch."""
    from triton.backends.nvidia.driver import CudaLauncher

    class Checked(CudaLauncher):
        def __init__(self, src: Any, metadata: Any):
            super().__init__(src, metadata)
            self.source, self.about = src, metadata

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: object) -> None:
            values = dict(zip(self.source.fn.arg_names, args[4:], strict=True))
            for name, value in values.items():
                if isinstance(value, OnCard) and value.device.index != CurrentDevice.index:
                    raise Fault(f"{name} is on {value.device}, the current device is {CurrentDevice.index}")
            self.check_divisibility(values)
            before = library.last.count
            super().__call__(x, y, z, stream, function, *args)
            if library.last.count != before + 1:
                raise Fault(f"the grid {x}, {y}, {z} was passed over without a word")
            self.check_parameters(values)
            last = library.last
            if tuple(last.grid) != (x, y, z) or last.stream != STREAM or last.shared != self.about.shared:
                raise Fault(f"grid {tuple(last.grid)}, stream {last.stream}, {last.shared} bytes arrived")
            plain = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            registers = library.code.stub_registers(function)
            name = self.source.fn.__name__
            launches.append(Launch(name, plain, tuple(last.grid), last.block[0], last.shared, registers))

        def check_divisibility(self, values: dict[str, object]) -> None:
            """A compiled kernel is used again for all arguments of its kind: is this one?"""
            names = list(values)
            for (i, *inner), attributes in self.source.attrs.items():
                value = values[names[i]]
                number = value.data_ptr() if isinstance(value, Tensor) else value
                if not inner and ["tt.divisibility", 16] in attributes and number % 16:
                    raise Fault(f"{names[i]} is {number}, no multiple of 16 as the compiled code has it")

        def check_parameters(self, values: dict[str, object]) -> None:
            """As many as the machine code reads, each of the same size and value; two of Triton's own follow."""
            last, wanted = library.last, []
            for name, kind in self.source.signature.items():
                if kind != "constexpr":
                    wanted += [(name, *one) for one in expected(kind, values[name])]
            if last.parameters != len(wanted) + 2:
                raise Fault(f"{len(wanted) + 2} parameters for a kernel that takes {last.parameters}")
            for i, (name, bytes_, value) in enumerate(wanted):
                if last.bytes[i] != bytes_ or (value is not None and last.value[i] != value):
                    found = f"{last.bytes[i]} bytes, {last.value[i]:#x}"
                    raise Fault(f"{name} arrived as {found}, should be {bytes_} bytes, {value:#x}")

    return Checked


def expected(kind: str, value: Any) -> Iterator[tuple[int, int | None]]:
    """Bytes and unsigned value of the parameters that an argument becomes."""
    if kind.startswith("*"):
        yield 8, 0 if value is None else value.data_ptr()
    elif kind.startswith("tensordesc"):
        yield 128, value.base.data_ptr()  # where stub_cuda.c has put it
        yield from ((4, size) for size in value.shape)
        yield from ((8, stride) for stride in value.strides)
    elif kind in ("fp32", "f32"):
        yield 4, int.from_bytes(struct.pack("<f", value), "little")
    elif kind == "u1":
        yield 1, int(value)
    else:
        bits = int(kind[1:])
        yield bits // 8, value % 2**bits


@contextmanager
def launching(cc: int, folder: Path) -> Iterator[tuple[list[Launch], Memory]]:
    """Launches inside are checked and collected; the library is compiled into `folder`."""
    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("start this process with TRITON_INTERPRET=0")
    launches, card = [], CARDS[cc]
    library = Library(folder, card)
    OnCard.memory = Memory(library)

    class Stub(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = checked_launcher(library, launches)
            self.get_current_stream = lambda device: STREAM
            self.get_current_device = lambda: CurrentDevice.index
            self.get_device_capability = lambda device=0: divmod(cc, 10)

    with ExitStack() as stack:
        for name, value in pretended_torch(cc, card).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(Pretended())
        driver.set_active(Stub())
        yield launches, OnCard.memory
