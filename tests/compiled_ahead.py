"""For test_compile_ahead.py, in a process of its own: what a walk compiles ahead, and what true launches then compile.

    python compiled_ahead.py ahead|launch FOLDER

`ahead` walks the cases on the meta device; `launch` runs them through Triton's own launch path on the stub driver.
Prints the names of kernels that were compiled, those that the cache had left out.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

CC = 90
CASES = (("vector", "q4_k", 1), ("vector", "q8_0 planar", 2), ("fused", "q8_0 planar", 16), ("two_pass", "q4_k", 600))
N, K = 3072, 3072


def run_cases(empty) -> None:
    """empty(*shape, dtype) makes tensors where the cases run."""
    import torch

    from flux_quant.formats import FORMATS, IN_MEMORY
    from flux_quant.kernels import dequant, eight_bit, int8, int8_tma, pointwise, triton_path

    for path, name, m in CASES:
        fmt = IN_MEMORY.get(name) or FORMATS[name]
        parts = [empty(*part.shape((N, K)), dtype=part.dtype) for part in fmt.parts]
        x, bias = empty(m, K, dtype=torch.bfloat16), empty(N, dtype=torch.bfloat16)
        for some in (None, bias):
            if path == "two_pass":
                dequant.blocks_to_dense(parts[0], triton_path.kernel_rows(fmt, K), empty(N, K, dtype=torch.bfloat16))
            else:
                triton_path.run(path, x, fmt, parts, some, None)
    a, w = empty(512, K, dtype=torch.int8), empty(N, K, dtype=torch.int8)
    scales = empty(512, 1, dtype=torch.float32), empty(N, dtype=torch.float32)
    int8.int8_matmul(a, scales[0], w, scales[1], None, torch.bfloat16, int8.configs_of(a.device)[-3])
    int8_tma.int8_matmul_tma(a, scales[0], w, scales[1], None, torch.bfloat16)
    eight_bit.quantized(x)
    wide = empty(1, 512, 4 * K, dtype=torch.bfloat16)
    pointwise.gelu(wide, wide)
    pointwise.gelu(wide[..., K:], wide[..., K:])


def compiled_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*/*.cubin"))


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
    import torch

    before = Counter(compiled_in(folder / "cache"))
    if what == "ahead":
        from flux_quant.kernels import ahead

        seen = ahead.compile_for(ahead.Card("NVIDIA H200", divmod(CC, 10), 132, 141 * 10**9))
        with torch.inference_mode():
            run_cases(lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))
        assert not seen.errors, seen.errors
    else:
        import stub_driver

        with stub_driver.launching(CC, folder) as (launches, _):
            run_cases(lambda *shape, dtype: stub_driver.empty(*shape, dtype=dtype))
        assert launches
    print(json.dumps(sorted((Counter(compiled_in(folder / "cache")) - before).elements())))


if __name__ == "__main__":
    main()
