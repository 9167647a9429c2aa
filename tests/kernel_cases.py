"""Which launches are compiled, for which architectures, and how many weights the counted instructions unpack.

A case calls a launcher of `kernels/` as it is, with tensors on the meta device in FLUX's shapes; tile sizes, warps and
stages are therefore the launcher's own. Importing this file imports no triton: the pytest process may have it in
interpreter mode, in which nothing can be compiled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from flux_quant.codecs.planar import FIELDS
from flux_quant.formats import FORMATS

N, K = 3072, 3072
BLOCKS = [name for name, fmt in FORMATS.items() if fmt.block > 1]
EVERY = (61, 75, 80, 86, 89, 90, 120)  # compute capabilities: GTX 10, RTX 20, A100, RTX 30, RTX 40, H100, RTX 50
UNPACKING = 10  # thread-instructions per weight at which an H200 is still limited by its memory, half of what it has

# Bytes per weight of the field of a block that holds most of the code: it must be loaded in wide pieces.
LARGEST_FIELD = {name: max(FIELDS.get(name, (128,))) / FORMATS[name].block for name in BLOCKS} | {"q5_1": 0.5}


@dataclass(frozen=True)
class Case:
    """`run` launches one kernel; `weights` tells from the launch how many weights the main loop unpacks in a turn, or
    the whole program if it has no loop. What it is held to: thread-instructions per weight, bytes per weight that must
    come in loads of 64 bits or more, and the matrix instruction that must be there."""

    family: str
    what: str
    cc: int
    run: Callable[[], object]
    weights: Callable[[object], float]
    aim: float | None = None
    wide: float = 0
    mma: str = ""

    @property
    def name(self) -> str:
        return f"{self.family} {self.what} sm_{self.cc}"


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def float_of(cc: int) -> torch.dtype:
    """What FLUX is computed in there: bfloat16 from Ampere on."""
    return torch.bfloat16 if cc >= 80 else torch.float16


def share_of_program(launch: object) -> float:
    return N * K / prod(launch.grid)


def dequantize(name: str, planar: bool, cc: int) -> None:
    from flux_quant.kernels import dequant, planes

    data = meta(N, *FORMATS[name].parts[0].shape((K,)))
    dequant.blocks_to_dense(data, planes.Rows(name, K, planar), meta(N, K, dtype=float_of(cc)))


def dequantize_fp8(per_row: bool, cc: int) -> None:
    from flux_quant.kernels import dequant

    scale = meta(*((N, 1) if per_row else ()), dtype=torch.float32)
    out = meta(N, K, dtype=float_of(cc))
    dequant.fp8_to_dense(meta(N, K, dtype=torch.float8_e4m3fn), scale, out, native=cc >= 89)


def dequant_cases() -> Iterator[Case]:
    """Both byte orders of every format: planar as weights are kept on a GPU, native as they lie in a mapped file."""
    for cc in EVERY:
        for name in BLOCKS:
            for order in ["planar"] * (name in FIELDS) + ["native"]:
                run = partial(dequantize, name, order == "planar", cc)
                wide = 0 if name in FIELDS and order == "native" else LARGEST_FIELD[name]
                yield Case("dequant", f"{name} {order}", cc, run, share_of_program, UNPACKING, wide)
        for scale in ("tensor", "row"):
            run = partial(dequantize_fp8, scale == "row", cc)
            yield Case("dequant", f"fp8 {scale}", cc, run, share_of_program, UNPACKING, wide=1)


def example(name: str, cc: int) -> None:
    import kernel_examples as examples

    getattr(examples, name)(cc)


def example_cases() -> Iterator[Case]:
    """Kernels with known faults, to see that the instruments find them."""
    for name in ("copy_aligned", "copy_misaligned", "multiply", "multiply_in_one_warp"):
        for cc in (86, 90):
            yield Case("example", name, cc, partial(example, name, cc), share_of_program)


FAMILIES = (example_cases, dequant_cases)
CASES = {case.name: case for cases in FAMILIES for case in cases()}
