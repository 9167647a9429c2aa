"""Compile what a card will launch before it launches it, in processes that never touch the card.

Triton compiles a kernel at its first launch, for seconds, on one core, and keeps it in its cache on disk. After
`compile_for` a process compiles and caches every launch on tensors of the meta device, with the card's own limits, and
computes nothing: so the functions that will run on the card can be walked as they are, many processes at a time. The
entries of the cache are those of a true launch: its key holds types, integers that are 1 or multiples of 16, addresses
that are multiples of 16, compile-time arguments and options, and `Address` stands for a tensor in all of these.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flux_quant.formats import QuantFormat
from flux_quant.kernels import dispatch, eight_bit, fallback, int8, products

META = torch.device("meta")
CUDA = torch.device("cuda")
WARP = 32  # threads


@dataclass(frozen=True)
class Card:
    """What launchers ask a device for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int  # bytes

    @classmethod
    def of(cls, device: torch.device) -> "Card":
        about = torch.cuda.get_device_properties(device)
        return cls(about.name, (about.major, about.minor), about.multi_processor_count, about.total_memory)


@dataclass
class Seen:
    """What a process has compiled: names of kernels, and what went wrong."""

    kernels: dict[str, str] = field(default_factory=dict)  # hash of a cache entry -> name of the kernel
    errors: list[str] = field(default_factory=list)
    launchers: int = 0  # C stubs, which need the driver's library
    share: tuple[int, int] = (0, 1)  # (i, n): part i of n of the launches is compiled, the others are left to others


class Address:
    """Stands for a tensor in a launch."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = tensor.storage_offset() * tensor.dtype.itemsize  # allocations begin at multiples of 256

    def data_ptr(self) -> int:
        return self.offset


class Target:
    """A driver for a card that this process does not open."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.cc = capability[0] * 10 + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(card: Card) -> Seen:
    """From now on launches are compiled for `card`, and this process is of no other use.

    RuntimeError where kernels are interpreted.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    seen, run, compile_ = Seen(), JITFunction.run, JITFunction._do_compile

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        args = [stand_in(arg) for arg in args]
        options = {key: stand_in(value) for key, value in options.items()}
        try:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:  # a configuration that does not compile is told, the others go on
            seen.errors.append(f"{kernel.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None
        if compiled is not None and compiled.hash not in seen.kernels:
            seen.kernels[compiled.hash] = kernel.__name__
            seen.launchers += launcher_built(compiled)
        return compiled

    def mine(kernel: JITFunction, key: str, *arguments: object) -> CompiledKernel | None:
        number, of = seen.share
        return (
            compile_(kernel, key, *arguments) if int(sha256(key.encode()).hexdigest()[:8], 16) % of == number else None
        )

    driver.set_active(Target(card.capability))
    JITFunction.run, JITFunction._do_compile = compile_only, mine
    pretend(card)
    return seen


def stand_in(argument: object) -> object:
    return Address(argument) if isinstance(argument, Tensor) else argument


def launcher_built(compiled: CompiledKernel) -> bool:
    """Build the C stub that launches such arguments. Not where the driver's library is missing: there is no launch."""
    from triton.backends.nvidia.driver import CudaLauncher

    try:
        CudaLauncher(compiled.src, compiled.metadata)
    except Exception:  # no library, no C compiler: a launch would say so
        return False
    return True


def pretend(card: Card) -> None:
    """torch and our own modules take tensors of the meta device for the card's."""
    properties = SimpleNamespace(
        name=card.name, multi_processor_count=card.multiprocessors, total_memory=card.memory, L2_cache_size=1 << 20
    )
    torch.cuda.get_device_capability = lambda device=None: card.capability
    torch.cuda.get_device_name = lambda device=None: card.name
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    products.MULTIPROCESSORS.clear()
    products.MULTIPROCESSORS[card.capability] = card.multiprocessors
    fallback.obstacle = lambda device, minimum: None if card.capability >= minimum else "too old for Triton"
    dispatch.linear = straight
    obstacles, chosen, tiles = eight_bit.int8_obstacles, eight_bit.int8_product, int8.configs_of
    eight_bit.int8_obstacles = lambda rows, shape, device: obstacles(rows, shape, CUDA)
    eight_bit.int8_product = lambda rows, shape, device: chosen(rows, shape, CUDA)
    int8.configs_of = lambda device: tiles(CUDA)


def straight(x: Tensor, fmt: QuantFormat, parts: list[Tensor], bias: Tensor | None = None) -> Tensor:
    """`dispatch.linear`, which would take a tensor without data to be traced."""
    bias = None if bias is None else bias.to(x.dtype)
    if fmt.is_plain and parts[0].dtype == x.dtype:
        return F.linear(x, parts[0], bias)
    return dispatch.run_linear(x, fmt, parts, bias)
