"""A stand-in for a small GPU, as frontends take it: half of the blocks of whatever is planned for have to stream."""

from dataclasses import replace

from stream_backends import ThreadDevice

from flux_quant.planner.footprint import Model, TextEncoder, Work
from flux_quant.planner.gpus import find_gpu
from flux_quant.planner.memory import Budget
from flux_quant.planner.plan import Plan
from flux_quant.planner.steptime import Host
from flux_quant.runtime import Memory
from flux_quant.streaming import rings_for, spread_evenly

GB = 10**9


class Readings:
    """Of a device that has room for what it holds, and for no more."""

    def free(self) -> int:
        return 0

    def held(self) -> int:
        return GB

    now = held

    def forget(self) -> None:
        pass


class HalfMemory(Memory):
    def plan(self, model: Model, work: Work, encoder: TextEncoder | None) -> Plan:
        made = super().plan(model, work, encoder)
        names, sizes = made.stream.names, made.stream.sizes
        stay = frozenset(spread_evenly(len(names) // 2, len(names)))
        rings = rings_for([size for i, size in enumerate(sizes) if i not in stay])
        return replace(made, stream=replace(made.stream, resident=stay, rings=rings))


def half_memory(log=lambda line: None) -> Memory:
    device = ThreadDevice(lazy=False, compute_is_host=True)
    machine = find_gpu("rtx-3060-12gb").machine()
    return HalfMemory(device, machine, Budget(8 * GB, "test"), Host(), Readings(), log=log)
