"""The interpreter's memory check finds what it is for."""

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from memory_check import OutOfBounds  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the card, not in the interpreter")


@triton.jit
def copy(x, out, n, shift, SIZE: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, SIZE)
    pointers = x + i + shift
    if WIDE:
        values = tl.load(pointers.to(tl.pointer_type(tl.int16)), mask=i < n - 1).to(tl.int8)
    else:
        values = tl.load(pointers, mask=i < n) if MASKED else tl.load(pointers)
    tl.store(out + i, values, mask=i < n)


def run(kernel_device: str, n: int, shift: int = 0, masked: bool = True, wide: bool = False, room: int = 8) -> None:
    x = torch.arange(64, dtype=torch.int8)[16:24]
    copy[(1,)](x, torch.empty(64, dtype=torch.int8)[16 : 16 + room], n, shift, 16, masked, wide)


@pytest.mark.parametrize("arguments", [{}, {"n": 7, "shift": 1}, {"n": 1, "wide": True}], ids=str)
def test_sound(arguments, kernel_device):
    run(kernel_device, **{"n": 8} | arguments)


FAULTS = {
    "past the end": dict(n=8, shift=1),
    "before the start": dict(n=1, shift=-1),
    "unmasked": dict(n=8, masked=False),
    "store past the end": dict(n=8, room=7),
    "between two addresses": dict(n=3, shift=1, wide=True),
}


@pytest.mark.parametrize("arguments", FAULTS.values(), ids=FAULTS)
def test_faults(arguments, kernel_device):
    with pytest.raises(Exception) as caught:
        run(kernel_device, **arguments)
    errors = [caught.value]
    while errors[-1].__cause__ or errors[-1].__context__:
        errors.append(errors[-1].__cause__ or errors[-1].__context__)
    assert any(isinstance(error, OutOfBounds) for error in errors)
