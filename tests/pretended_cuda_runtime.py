"""What lies below torch's Python for CUDA, for `pretended_cuda`: memory that is counted, streams, events, graphs.

The Python of `torch.cuda` stays torch's own, with its checks of arguments; here are the functions of `torch._C` that it
calls, for one card. What is not in the table is not there, and fails.
"""

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import _device_constructors

ALIGN = 512  # of the caching allocator
DEVICE_TYPE = 1  # CUDA's number
PINNING = ("empty", "zeros", "ones", "randn", "rand", "empty_like", "empty_strided", "full")


@dataclass(frozen=True)
class Card:
    """`cudaDeviceProp` under the names that torch gives, of an H200 with little memory."""

    name: str = "Pretended H200"
    major: int = 9
    minor: int = 0
    total_memory: int = 8 << 30
    multi_processor_count: int = 132
    L2_cache_size: int = 60 << 20
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    max_threads_per_block: int = 1024
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    shared_memory_per_multiprocessor: int = 233472
    warp_size: int = 32
    clock_rate: int = 1980000
    memory_clock_rate: int = 3201000
    memory_bus_width: int = 6144
    pci_bus_id: int = 1
    pci_device_id: int = 0
    pci_domain_id: int = 0
    uuid: str = "0"


class Capture(list):
    """Operators of a graph that is being recorded."""


@dataclass
class Runtime:
    card: Card = field(default_factory=Card)
    live: list[tuple[StorageWeakRef, int]] = field(default_factory=list)
    bound: int = 0  # no less than what is allocated
    peak: int = 0
    count: int = 0  # allocations so far
    total: int = 0  # bytes of them
    fraction: float = 1.0
    pinned: dict[int, int] = field(default_factory=dict)  # registered: address -> bytes
    page_locked: list[tuple[StorageWeakRef, int, int]] = field(default_factory=list)  # torch's own pinned memory
    copies: list[tuple[str, str, bool, int]] = field(default_factory=list)  # to, from, asynchronous, bytes
    capture: Capture | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    streams: threading.local = field(default_factory=threading.local)
    made_streams: int = 0

    def take(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 of RAM that stands for the device's, at an address as the allocator gives them."""
        with self.lock:
            whole = torch.empty(max(nbytes, 1) + ALIGN, dtype=torch.uint8)
            size = -(-nbytes // ALIGN) * ALIGN
            limit = self.fraction * self.card.total_memory
            if self.bound + size > min(limit, max(self.peak, 0)) and self.allocated() + size > limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {nbytes} bytes. GPU 0 has a total capacity of "
                    f"{self.card.total_memory} bytes of which {int(limit) - self.allocated()} bytes is free."
                )
            self.live.append((StorageWeakRef(whole.untyped_storage()), size))
            self.bound, self.count, self.total = self.bound + size, self.count + 1, self.total + size
            if self.bound > self.peak:
                self.peak = max(self.peak, self.allocated())
        start = -whole.data_ptr() % ALIGN
        whole.fill_(0xFF)  # NaN, whatever float it is taken for
        return whole[start : start + nbytes] if nbytes else whole[start : start + 1]

    def allocated(self) -> int:
        with self.lock:
            self.live = [(ref, size) for ref, size in self.live if not ref.expired()]
            self.bound = sum(size for _, size in self.live)
            return self.bound

    def stats(self, _: int) -> dict:
        now = self.allocated()
        nbytes = {"current": now, "peak": self.peak, "allocated": self.total, "freed": self.total - now}
        calls = {"current": len(self.live), "allocated": self.count, "freed": self.count - len(self.live)}
        names = {"allocated_bytes": nbytes, "reserved_bytes": nbytes, "active_bytes": nbytes}
        names |= {"allocation": calls, "segment": calls}
        return {name: {"all": counts} for name, counts in names.items()} | {"num_device_alloc": self.count}

    def reset_peak(self, _: int) -> None:
        self.peak = self.allocated()

    def set_fraction(self, fraction: float, _: int) -> None:
        self.fraction = fraction

    def is_pinned(self, x: Tensor) -> bool:
        with self.lock:
            self.page_locked = [row for row in self.page_locked if not row[0].expired()]
            ranges = [*self.pinned.items(), *((start, size) for _, start, size in self.page_locked)]
        return x.device.type == "cpu" and any(start <= x.data_ptr() < start + size for start, size in ranges)

    def lock_pages(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.page_locked.append((StorageWeakRef(storage), storage.data_ptr(), storage.nbytes()))
        return x

    def current_stream(self, device: int) -> tuple[int, int, int]:
        return getattr(self.streams, "current", 0), device, DEVICE_TYPE

    def set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.streams.current = stream_id


RUNTIME = Runtime()


class cudaError(IntEnum):
    success = 0
    invalidValue = 1
    hostMemoryAlreadyRegistered = 712
    hostMemoryNotRegistered = 713


class Cudart:
    """torch's module of the runtime's own functions."""

    cudaError = cudaError

    @staticmethod
    def cudaGetErrorString(error: cudaError) -> str:
        return error.name

    @staticmethod
    def cudaHostRegister(pointer: int, nbytes: int, flags: int) -> cudaError:
        assert type(pointer) is type(nbytes) is type(flags) is int, "pybind takes nothing but int"
        if not nbytes:
            return cudaError.invalidValue
        with RUNTIME.lock:
            if any(start < pointer + nbytes and pointer < start + size for start, size in RUNTIME.pinned.items()):
                return cudaError.hostMemoryAlreadyRegistered
            RUNTIME.pinned[pointer] = nbytes
        return cudaError.success

    @staticmethod
    def cudaHostUnregister(pointer: int) -> cudaError:
        return cudaError.success if RUNTIME.pinned.pop(pointer, None) else cudaError.hostMemoryNotRegistered

    @staticmethod
    def cudaMemGetInfo(device: int) -> tuple[int, int]:
        return RUNTIME.card.total_memory - RUNTIME.allocated(), RUNTIME.card.total_memory


class StreamBase:
    def __new__(cls, priority=0, stream_id=None, device_index=0, device_type=DEVICE_TYPE, stream_ptr=None):
        self = object.__new__(cls)
        if stream_id is None:
            RUNTIME.made_streams += 1
            stream_id = RUNTIME.made_streams
        self.stream_id, self.device_index, self.device_type = stream_id, device_index, device_type
        self.device, self.cuda_stream, self.priority = torch.device("cuda", device_index), stream_id, priority
        return self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synchronize()

    def __eq__(self, other: object) -> bool:
        return self.stream_id == other.stream_id

    __hash__ = object.__hash__


class EventBase:
    def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
        self = object.__new__(cls)
        self.timed, self.at = enable_timing, None
        return self

    def record(self, stream: StreamBase | None = None) -> None:
        assert stream is None or isinstance(stream, StreamBase)
        self.at = time.perf_counter()

    def wait(self, stream: StreamBase | None = None) -> None:
        assert stream is None or isinstance(stream, StreamBase)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if RUNTIME.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def elapsed_time(self, end: "EventBase") -> float:
        if not (self.timed and end.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.at is None or end.at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end.at - self.at) * 1e3


class GraphBase:
    """Replays by doing everything again, in the memory of the first time."""

    def __new__(cls, keep_graph=False):
        return object.__new__(cls)

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        if RUNTIME.streams.current == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.work = RUNTIME.capture = Capture()

    def capture_end(self) -> None:
        RUNTIME.capture = None

    def replay(self) -> None:
        for work in self.work:
            work()

    def reset(self) -> None:
        self.work = Capture()


def synchronize() -> None:
    if RUNTIME.capture is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def nothing(*_: object) -> None:
    pass


C_FUNCTIONS: dict[str, Callable] = {
    "_cuda_getDeviceCount": lambda: 1,
    "_cuda_init": nothing,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDevice": lambda: 0,
    "_cuda_setDevice": nothing,
    "_cuda_getArchFlags": lambda: "sm_90",
    "_cuda_synchronize": synchronize,
    "_cuda_emptyCache": nothing,
    "_host_emptyCache": nothing,
    "_cuda_memoryStats": RUNTIME.stats,
    "_cuda_resetPeakMemoryStats": RUNTIME.reset_peak,
    "_cuda_resetAccumulatedMemoryStats": nothing,
    "_cuda_setMemoryFraction": RUNTIME.set_fraction,
    "_cuda_getCurrentStream": RUNTIME.current_stream,
    "_cuda_getDefaultStream": lambda device: (0, device, DEVICE_TYPE),
    "_cuda_getCurrentRawStream": lambda device: RUNTIME.current_stream(device)[0],
    "_cuda_setStream": RUNTIME.set_stream,
    "_cuda_isCurrentStreamCapturing": lambda: RUNTIME.capture is not None,
    "_cuda_sleep": nothing,
    "_CudaStreamBase": StreamBase,
    "_CudaEventBase": EventBase,
    "_CUDAGraph": GraphBase,
    "_graph_pool_handle": lambda: (0, 1),
    "_has_cuda": True,
}


def fresh_copy(module: object) -> object:
    """A module of torch anew, over the bases that are there now. It is in no table of modules."""
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def pinning(make: Callable) -> Callable:
    """A factory of torch that knows `pin_memory`."""

    def made(*args: object, pin_memory: bool = False, **kwargs: object) -> Tensor:
        x = make(*args, **kwargs)
        return RUNTIME.lock_pages(x) if pin_memory and x.device.type == "cpu" else x

    return made


def pin_memory(x: Tensor, device: torch.device | None = None) -> Tensor:
    if x.is_cuda:
        raise RuntimeError(f"cannot pin '{x.type()}' only dense CPU tensors can be pinned")
    return x if RUNTIME.is_pinned(x) else RUNTIME.lock_pages(x.clone())


@contextmanager
def patched_torch(properties: dict[str, object]) -> Iterator[None]:
    """torch with a card whose properties these are, and as it was afterwards."""
    _device_constructors()  # remembers the factories as they are: `with torch.device` asks for them
    RUNTIME.__init__(card=replace(Card(), **properties))
    with mock.patch.multiple(torch._C, create=True, **C_FUNCTIONS):
        streams, graphs = fresh_copy(torch.cuda.streams), fresh_copy(torch.cuda.graphs)
        named = {
            **{name: getattr(streams, name) for name in ("Stream", "ExternalStream", "Event")},
            **{name: getattr(graphs, name) for name in ("CUDAGraph", "graph", "is_current_stream_capturing")},
            "_cudart": Cudart,
            "_get_device_properties": lambda _: RUNTIME.card,
            "_initialized": True,  # torch asks for it once in a process
            "_queued_calls": [],
            "device_count": lambda: 1,
            "_exchange_device": lambda device: 0 if device >= 0 else -1,
            "_maybe_exchange_device": lambda device: 0 if device >= 0 else -1,
            "default_generators": (torch.Generator(),),  # random numbers come from the CPU's own
        }
        version = torch.version.cuda or "13.0"
        with (
            mock.patch.multiple(torch.cuda, create=True, **named),
            mock.patch.multiple(torch.Tensor, is_pinned=lambda x, device=None: RUNTIME.is_pinned(x)),
            mock.patch.multiple(torch.Tensor, pin_memory=pin_memory),
            mock.patch.multiple(torch, **{name: pinning(getattr(torch, name)) for name in PINNING}),
            mock.patch.multiple(torch.version, cuda=version),
        ):
            yield
