"""Transformer blocks that do not fit the device pass through it, one copy each, behind the compute.

Moves buffers and knows nothing of what they hold. A plan is a value (`plan.py`), which `streamer.py` carries out
without deciding anything; `layout.py` says where the tensors of a block lie in its buffer, `host.py` where that buffer
lies in RAM, `device.py` what a device must be able to do, `meter.py` what it cost.
"""

from flux_quant.streaming.layout import block_bytes
from flux_quant.streaming.memory import pin_budget
from flux_quant.streaming.meter import StreamMetrics
from flux_quant.streaming.plan import Ring, StreamPlan, rings_for, spread_evenly
from flux_quant.streaming.streamer import BlockStreamer

__all__ = [
    "BlockStreamer",
    "Ring",
    "StreamMetrics",
    "StreamPlan",
    "block_bytes",
    "pin_budget",
    "rings_for",
    "spread_evenly",
]
