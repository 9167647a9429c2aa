"""The assembler in `kernels.codes` against its twins in plain Triton.

No machine without a GPU can run PTX. The handful of instructions used there is simple enough to be emulated after their
description in NVIDIA's PTX ISA (sections on `prmt` and `lop3`), on the packing that Triton promises: four bytes, or two
halves, of consecutive elements in a register, the first in the lowest bits.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from flux_quant.kernels import codes  # noqa: E402
from flux_quant.kernels.planes import LAYOUTS, Rows  # noqa: E402

EVERY = np.arange(256, dtype=np.uint8)
RANDOM = np.random.default_rng(0).integers(0, 256, (3, 4096), dtype=np.uint8)
MASKS = (1 << RANDOM[1] % 8).astype(np.uint8)
NIBBLES = RANDOM[0] & 15
LATE = np.where(RANDOM[2] & 1, 255, 0).astype(np.uint8)

# Name -> function in `codes`, arrays of bytes, constants.
CASES: dict[str, tuple[str, tuple[np.ndarray, ...], tuple]] = {
    **{
        f"shifted {s} {m}": ("shifted", (EVERY,), (s, m)) for s, m in [(0, 15), (4, 15), (0, 3), (2, 3), (4, 3), (6, 3)]
    },
    **{f"with_bit {bit}": ("with_bit", (NIBBLES & (1 << bit) - 1, RANDOM[2], MASKS), (bit,)) for bit in (2, 4)},
    **{f"with_two_bits {p}": ("with_two_bits", (NIBBLES, RANDOM[1], LATE), (p,)) for p in (0, 1)},
    "flipped": ("flipped", (EVERY,), ()),
    "biased 7 bits": ("biased", (EVERY[:128],), (Rows("q4_k", 256),)),
    "biased 8 bits": ("biased", (EVERY,), (Rows("q8_0", 256),)),
    "table_values": ("table_values", (NIBBLES,), ()),
    "e4m3_in_halves": ("e4m3_in_halves", (EVERY,), ()),
}


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Every bit from the table's entry at 4 a + 2 b + c."""
    result = np.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each nibble of the selector picks one of the eight bytes of b:a."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for byte in range(4):
        choice = selector.astype(np.uint64) >> np.uint64(4 * byte) & np.uint64(15)
        assert (choice < 8).all()  # the eighth bit would repeat signs: not used
        result |= (both >> choice * np.uint64(8) & np.uint64(255)) << np.uint64(8 * byte)
    return result.astype(np.uint32)


OPERATIONS = {
    "shl.b32": lambda a, n: a << n,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: a + b,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(table.flat[0])),
}


def execute(asm: str, registers: dict[str, np.ndarray], count: int) -> None:
    """Run the instructions on arrays of `count` registers; the results are left in `registers`."""
    for line in re.sub(r"\.reg [^;]*;|[{}]", " ", asm).split(";"):
        if not line.strip():
            continue
        name, operands = line.strip().split(maxsplit=1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [
            np.full(count, int(source, 0), np.uint32) if source[0].isdigit() else registers[source]
            for source in sources
        ]
        registers[target] = OPERATIONS[name](*values).astype(np.uint32)


def emulated(asm: str, constraints: str, args: list, dtype: object, is_pure: bool, pack: int) -> np.ndarray:
    """What `tl.inline_asm_elementwise` does with `pack` elements at a time, on arrays."""
    asm = getattr(asm, "value", asm)
    outputs = constraints.split(",").count("=r")
    packed = [np.ascontiguousarray(arg).view(np.uint32) for arg in args]
    assert pack == 4 and len(packed) == constraints.split(",").count("r")
    registers = {f"${outputs + i}": values for i, values in enumerate(packed)}
    execute(asm, registers, packed[0].size)
    return np.stack([registers[f"${i}"] for i in range(outputs)], axis=1).reshape(-1)


@triton.jit
def apply(a, b, c, out, F: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """F with its arrays, one or three, and its constants, two at most."""
    at = tl.arange(0, COUNT)
    if b is not None:
        tl.store(out + at, F(tl.load(a + at), tl.load(b + at), tl.load(c + at), FIRST))
    elif FIRST is None:
        tl.store(out + at, F(tl.load(a + at)))
    elif SECOND is None:
        tl.store(out + at, F(tl.load(a + at), FIRST))
    else:
        tl.store(out + at, F(tl.load(a + at), FIRST, SECOND))


def by_twin(name: str, arrays: tuple[np.ndarray, ...], constants: tuple, dtype: torch.dtype, device: str) -> np.ndarray:
    """By the kernel: on CUDA the assembler itself, in the interpreter its twin."""
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    out = torch.empty(arrays[0].size, dtype=dtype, device=device)
    a, b, c, first, second = [*tensors, None, None][:3] + [*constants, None, None][:2]
    apply[(1,)](a, b, c, out, getattr(codes, name), out.numel(), first, second)
    return out.cpu().numpy()


@pytest.mark.parametrize(("name", "arrays", "constants"), CASES.values(), ids=CASES)
def test_assembler_and_twin_agree(name, arrays, constants, kernel_device, monkeypatch):
    twin = by_twin(name, arrays, constants, dtype_of(name), kernel_device)
    function = getattr(codes, name)
    spied = SimpleNamespace(**{key: getattr(tl, key) for key in ("constexpr", "uint8", "float16", "float32")})
    spied.inline_asm_elementwise = emulated
    plain = function.fn
    monkeypatch.setitem(plain.__globals__, "tl", spied)
    monkeypatch.setitem(plain.__globals__, "PACKED", True)
    monkeypatch.setitem(plain.__globals__, "ONES", 0x01010101)
    result = plain(*arrays, *constants)
    assert np.array_equal(result.view(np.uint8), twin.view(np.uint8))


def dtype_of(name: str) -> torch.dtype:
    return {"biased": torch.float32, "e4m3_in_halves": torch.float16}.get(name, torch.uint8)


def test_halves_are_e4m3(kernel_device):
    halves = torch.from_numpy(by_twin("e4m3_in_halves", (EVERY,), (), torch.float16, kernel_device))
    expected = torch.from_numpy(EVERY).view(torch.float8_e4m3fn).float()
    sound = expected.isfinite()
    assert torch.equal(halves.float()[sound] * 256, expected[sound])
    assert halves[~sound].isnan().all() and sound.sum() == 254


def test_codes_fit_their_bias():
    """Below 128 in a mantissa's upper seven bits, any byte in its lower fifteen."""
    for name, layout in LAYOUTS.items():
        assert layout.bias == (32768 if name in ("q8_0", "iq4_nl", "iq4_xs") else 128)
