"""Memory of T5 at its full width: packed tables stay packed, and under a budget used blocks leave the process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

BLOCKS = 3
ENCODE = """
import json, sys
from pathlib import Path
import torch
from flux_quant.benchmarks.text_memory import forget_peak, memory
from flux_quant.text.encoders import Placement, t5_states

def grown(budget):
    forget_peak()
    before = memory("VmRSS")["VmRSS"]
    states = t5_states(Path(sys.argv[1]), torch.arange(16).view(1, -1), Placement(ram_budget=budget))
    assert states.isfinite().all()
    return memory("VmHWM")["VmHWM"] - before

torch.set_num_threads(1)
grown(None)  # libraries
print(json.dumps([grown(None), grown(1)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's own account of a process' memory")
def test_an_encoding_takes_the_packed_blocks_or_one_of_them(tmp_path: Path, start: Callable):
    """A table of token vectors in float32 would be 526 MB by itself."""
    from flux_quant.benchmarks.text_memory import make

    path = tmp_path / "t5.gguf"
    nbytes = make(path, "q4_k", BLOCKS)
    process = start("-c", ENCODE, str(path))
    out, err = process.communicate(timeout=120)
    path.unlink()  # 433 MB, which pytest would keep for three runs
    assert process.returncode == 0, err
    whole, under_budget = json.loads(out)
    table = 32128 * 4096 // 256 * 210
    block = (nbytes - table) // BLOCKS
    assert BLOCKS * block < whole < BLOCKS * block + 100e6
    assert block < under_budget < block + 60e6
