"""Every load and store of a kernel in Triton's interpreter, held to the tensors that the kernel was given.

The interpreter reads any address, like a card that has other tensors around: a kernel that runs over the end, or takes
a masked-out element after all, gives right results in both, until the end of a tensor is the end of a page.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from torch import Tensor


class OutOfBounds(AssertionError):
    """A kernel touched memory that it was not given, or at an address that hardware refuses."""


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and behind its last one; gaps between rows lie inside."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def tensors_in(arguments: object) -> Iterator[Tensor]:
    """Those of a launch, of tensor descriptors and tuples too."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.numel():
                yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)
        elif hasattr(argument, "block_shape"):
            yield argument.base


def check(extents: list[tuple[int, int]], what: str, pointers: np.ndarray, live: np.ndarray, size: int) -> None:
    pointers, live = np.broadcast_arrays(pointers, live)
    wanted = pointers[live.astype(bool)].astype(np.int64)
    inside = np.zeros(wanted.shape, dtype=bool)
    for start, end in extents:
        inside |= (start <= wanted) & (wanted + size <= end)
    if not inside.all():
        raise OutOfBounds(f"{what} of {size} bytes at {int((~inside).sum())} addresses outside of all tensors")
    if (wanted % size).any():
        raise OutOfBounds(f"{what} of {size} bytes at an address that is no multiple of it")


@contextmanager
def checked() -> Iterator[None]:
    """Inside, launches in the interpreter raise `OutOfBounds`."""
    from triton.runtime import interpreter

    builder, executor, extents = interpreter.InterpreterBuilder, interpreter.GridExecutor, []
    load, store, prepare = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def size_of(pointers: "interpreter.TensorHandle") -> int:
        return max(8, pointers.get_element_ty().primitive_bitwidth) // 8

    def checked_load(self, pointers, mask, *rest, **options):
        check(extents, "load", pointers.data, mask.data, size_of(pointers))
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        check(extents, "store", pointers.data, mask.data, size_of(pointers))
        return store(self, pointers, value, mask, *rest, **options)

    def checked_arguments(self, *arguments):
        """Tensors of a device are copied to the host for a launch: the copies count."""
        on_host, options = prepare(self, *arguments)
        extents[:] = [extent(tensor) for tensor in tensors_in((*on_host, *options.values()))]
        return on_host, options

    with (
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
        mock.patch.object(executor, "_init_args_hst", checked_arguments),
    ):
        yield
