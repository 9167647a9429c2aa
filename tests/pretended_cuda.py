"""A pretended CUDA device: ordinary tensors that say `cuda:0`, with RAM for their memory and the CPU's arithmetic.

    with pretended_cuda():
        x = torch.randn(3, 4).cuda()  # x.is_cuda, type(x) is torch.Tensor; real numbers

What a first run on a card trips over fails here in the same way: a CPU tensor beside one on the device (but for numbers
without axes where CUDA takes them, and indices), a generator of the CPU, `.numpy()`, products of integers, operators
that CUDA lacks. Memory that nobody wrote holds NaN. It is no stream: everything is done at once, so that a missing wait
is not found here (`stream_backends` is for that).

How: DLPack says of a piece of RAM that it belongs to CUDA's device 0; torch makes an ordinary tensor of it. Every
operator that reaches the dispatch key CUDA is computed on CPU tensors over the same memory. That key is empty in a
torch without CUDA; in one with CUDA, but without a card, each operator that is registered is replaced. torch's own
Python of `torch.cuda` runs on a stand-in for the C functions below it: see `pretended_cuda_runtime`.

Triton's kernels, interpreted, work on such tensors as they are; `FLUX_QUANT_DISABLE_TRITON=1` is much faster.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from pretended_cuda_runtime import RUNTIME, Runtime, patched_torch
from torch import Tensor
from torch.utils import dlpack

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
BUILT = torch.version.cuda is not None  # operators for CUDA are there, and have to be replaced
# Operators on sizes and strides alone: their kernels for the CPU take tensors of any device.
VIEWS = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "view_as_real",
    "view_as_complex",
    "is_set_to",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
)
# Have kernels for every device in C++, which ask for what only CUDA has: replaced, not left to the fallback.
REPLACED = ("convolution", "_fused_sdp_choice", "resize_", "copy_", "empty.memory_format", "empty_strided")
INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")  # by CPU tensors too
TAKE_NUMBERS = ("aten::masked_fill", "aten::masked_fill_", "aten::fill_", "aten::index_fill", "aten::where")
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")  # the host waits
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
NOT_ON_CUDA = ("_add_relu", "narrow_copy", "histogram", "_scaled_dot_product_flash_attention_for_cpu", "to_mkldnn")


def storage_tensor(ram: Tensor) -> Tensor:
    """A uint8 tensor of the device over the RAM of another, which lives as long as it."""
    capsule = dlpack.to_dlpack(ram)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    device = (ctypes.c_int32 * 2).from_address(pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    device[:] = 2, 0  # kDLCUDA, its number
    return torch._C._from_dlpack(capsule)


def strided_over(base: Tensor, dtype: torch.dtype, size, stride, offset: int = 0) -> Tensor:
    empty = base[:0].view(dtype)
    setter = torch.ops.aten.set_.source_Storage_storage_offset
    return setter.redispatch(CPU_KEY, empty, base.untyped_storage(), offset, size, stride)


def allocate(dtype: torch.dtype, size, stride) -> Tensor:
    """Uninitialised memory of the device; torch.OutOfMemoryError beyond its limit."""
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    return strided_over(storage_tensor(RUNTIME.take(span * dtype.itemsize)), dtype, size, stride)


def ram_of(x: Tensor) -> Tensor:
    """A CPU tensor over the memory of one of the device."""
    storage = x.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.size(), x.stride())


def sent(x: Tensor) -> Tensor:
    """A CPU tensor's values in memory of the device, laid out alike."""
    dense = x if x.is_contiguous() else torch.empty_like(x)  # keeps the strides of whatever is dense
    out = allocate(x.dtype, x.size(), dense.stride())
    ram_of(out).copy_(x)
    return out


class Call:
    """One operator with tensors of the device among its arguments, on its way through the CPU."""

    def __init__(self, op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> None:
        self.op, self.name = op, op._schema.name
        self.written: dict[str, Tensor] = {}  # by alias set of the schema
        self.grown: list[tuple[Tensor, Tensor]] = []
        arguments = op._schema.arguments
        self.like = next((x.dtype for x in args if isinstance(x, Tensor)), torch.get_default_dtype())
        self.args = [self.enter(value, spec) for value, spec in zip(args, arguments, strict=False)]
        named = {spec.name: spec for spec in arguments}
        self.kwargs = {name: self.enter(value, named[name]) for name, value in kwargs.items()}

    def enter(self, value, spec):
        alias = spec.alias_info
        if isinstance(value, Tensor):
            return self.enter_tensor(value, next(iter(alias.before_set)) if alias and alias.is_write else None, spec)
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            return [item if item is None else self.enter_tensor(item, None, spec) for item in value]
        if isinstance(value, int | float) and isinstance(spec.type, torch.TensorType):  # torch had made it a tensor
            exact = self.like if isinstance(value, int) or self.like.is_floating_point else torch.get_default_dtype()
            return torch.tensor(value, dtype=exact)
        if isinstance(value, torch.device):
            return CPU if value.type == "cuda" else value
        if isinstance(value, torch.Generator) and value.device.type != "cuda":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return False if spec.name == "pin_memory" and value else value

    def enter_tensor(self, x: Tensor, letter: str | None, spec) -> Tensor:
        if letter is not None:
            self.written[letter] = x
        if not x.is_cuda:
            free = letter is None and (self.takes_numbers() and x.ndim == 0 or self.indexes(spec))
            if not free:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                    f"{x.device}! ({spec.name} of {self.name})"
                )
            return x
        if letter is not None and not x.numel():
            fresh = torch.empty(x.size(), dtype=x.dtype)  # may be resized by the operator
            self.grown.append((x, fresh))
            return fresh
        return ram_of(x)

    def takes_numbers(self) -> bool:
        return torch.Tag.pointwise in self.op.tags or self.name in TAKE_NUMBERS or self.name in INDEXED

    def indexes(self, spec) -> bool:
        return self.name in INDEXED and spec.name == "indices"

    def run(self):
        result = self.op(*self.args, **self.kwargs)
        for x, fresh in self.grown:
            if fresh.numel():
                new = sent(fresh)
                x.set_(new.untyped_storage(), 0, new.size(), new.stride())
        returns = self.op._schema.returns
        if not returns:  # _foreach_mul_ and its like
            return None
        if len(returns) == 1:
            return self.leave(result, returns[0])
        return tuple(self.leave(value, spec) for value, spec in zip(result, returns, strict=True))

    def leave(self, value, spec):
        if spec.alias_info is not None:
            letter = next(iter(spec.alias_info.before_set))
            if letter not in self.written:
                raise NotImplementedError(f"{self.name} is a view that the pretended device does not know")
            return self.written[letter]
        if isinstance(value, Tensor):
            return sent(value)
        return [sent(item) for item in value] if isinstance(value, list | tuple) else value


def compute(op: torch._ops.OpOverload, *args, **kwargs):
    """Any operator that nothing else is said of."""
    check(op, args)
    result = Call(op, args, kwargs).run()
    if RUNTIME.capture is not None:
        RUNTIME.capture.append(lambda: renewed(result, Call(op, args, kwargs).run()))
    return result


def renewed(old, new) -> None:
    """What a replay of a graph does: new values, in the memory of the old ones."""
    for before, after in zip(*(x if isinstance(x, list | tuple) else [x] for x in (old, new)), strict=True):
        if isinstance(before, Tensor):
            ram_of(before).copy_(ram_of(after))


def check(op: torch._ops.OpOverload, args: tuple) -> None:
    """RuntimeError for what the real device refuses and the CPU would do."""
    name = op._schema.name
    short = name.removeprefix("aten::")
    if RUNTIME.capture is not None and name in WAITING:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
    if short in NOT_ON_CUDA:
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CUDA' backend.")
    tensors = [x for x in args if isinstance(x, Tensor)]
    if short in PRODUCTS and any(not x.is_floating_point() and not x.is_complex() for x in tensors):
        raise RuntimeError(f'"{short}_cuda" not implemented for {tensors[0].dtype}')
    if short in PRODUCTS and any(x.dtype.itemsize == 1 for x in tensors):
        raise RuntimeError(f'"{short}_cuda" not implemented for {tensors[0].dtype}')
    if short == "_int_mm":
        m, k = args[0].shape
        if m <= 16 or k % 8 or args[1].shape[1] % 8:
            raise RuntimeError(f"_int_mm: size(0) > 16 and multiples of 8 are needed, got {m}, {k}, {args[1].shape}")
    if short == "_scaled_mm":
        a, b = args[:2]
        if a.shape[1] % 16 or b.shape[1] % 16 or a.stride(1) != 1 or b.stride(0) != 1:
            raise RuntimeError(f"_scaled_mm: row-major by column-major in multiples of 16, got {a.shape}, {b.shape}")


def copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if RUNTIME.capture is not None and not (to.is_cuda and source.is_cuda):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing (a copy to or from the host)")

    def run() -> None:
        ends = (ram_of(x) if x.is_cuda else x for x in (to, source))
        next(ends).copy_(next(ends))

    run()
    RUNTIME.copies.append((to.device.type, source.device.type, non_blocking, source.nbytes))
    if RUNTIME.capture is not None:
        RUNTIME.capture.append(run)
    return to


def empty(size, *, dtype=None, memory_format=None, **_: object) -> Tensor:
    format = torch.contiguous_format if memory_format in (None, torch.preserve_format) else memory_format
    shape = torch.empty(size, dtype=dtype or torch.get_default_dtype(), device="meta", memory_format=format)
    return allocate(shape.dtype, shape.size(), shape.stride())


def empty_strided(size, stride, *, dtype=None, **_: object) -> Tensor:
    return allocate(dtype or torch.get_default_dtype(), size, stride)


def resize_(x: Tensor, size, *, memory_format=None) -> Tensor:
    new = empty(size, dtype=x.dtype)
    if new.nbytes > x.untyped_storage().nbytes():
        return x.set_(new.untyped_storage(), 0, new.size(), new.stride())
    return x.set_(x.untyped_storage(), x.storage_offset(), new.size(), new.stride())


OWN = {
    "copy_": copy_,
    "empty.memory_format": empty,
    "empty_strided": empty_strided,
    "resize_": resize_,
    "_fused_sdp_choice": lambda *_, **__: 0,  # the one of plain operators
}


def overload(name: str) -> torch._ops.OpOverload:
    space, _, name = name.rpartition("::")
    packet, _, which = name.partition(".")
    return getattr(getattr(getattr(torch.ops, space or "aten"), packet), which or "default")


def kernels() -> Iterator[tuple[str, Callable]]:
    """Operator, what computes it: those that need saying, and all others where CUDA's own are in the way."""
    for name in () if BUILT else VIEWS:
        yield name, partial(overload(name).redispatch, CPU_KEY)
    for name in REPLACED:
        yield name, OWN.get(name) or partial(compute, overload(name))
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if BUILT else ():
        short = name.removeprefix("aten::")
        if name.startswith("aten::") and short not in (*VIEWS, *REPLACED):
            yield short, partial(compute, overload(name))


@contextmanager
def device_guard() -> Iterator[None]:
    """What torch asks for the current device and its streams: the version for tensors without memory.

    torch installs it where CUDA's own says that it has no devices, so where there is none, something says so for it.
    """
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, none = guards[1], ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda _: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(none, ctypes.c_void_p).value] * 64)
    if before is None:
        guards[1] = ctypes.addressof((ctypes.c_void_p * 1).from_buffer(methods_pointer := ctypes.c_void_p()))
        methods_pointer.value = ctypes.addressof(methods)
    torch._C._ensureCUDADeviceGuardSet()
    try:
        yield
    finally:
        guards[1] = before


@contextmanager
def pretended_cuda(**properties: object) -> Iterator[Runtime]:
    """The device exists inside; `properties` are those of `pretended_cuda_runtime.Card` that differ."""
    if torch.cuda.is_available():
        raise RuntimeError("there is a CUDA device, real or pretended")
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rest, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        with device_guard(), patched_torch(properties):
            rest.fallback(compute, "CUDA")
            for name, kernel in kernels():
                ours.impl(name, kernel, "CUDA", allow_override=True)
            try:
                yield RUNTIME
            finally:
                for library in (rest, ours):
                    library._destroy()
                forget()


def forget() -> None:
    """What our modules remember of devices."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flux_quant."):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()
    for name, table in (("fallback", "FAILED"), ("triton_path", "_scratch")):
        getattr(sys.modules.get(f"flux_quant.kernels.{name}"), table, {}).clear()
