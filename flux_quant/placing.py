"""A request as work on a device: what is planned, where T5 is, whether ControlNets stay or stream."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import nn

from flux_quant.components import Components
from flux_quant.controlnet import acting, device_bytes
from flux_quant.converters.component import open_component
from flux_quant.drawing import vae
from flux_quant.drawing.given import Given, Nets, reference_size
from flux_quant.drawing.redux import redux_length
from flux_quant.drawing.request import PATCH, Request
from flux_quant.errors import UserError
from flux_quant.lora import makes_outputs
from flux_quant.model import Flux
from flux_quant.planner.footprint import BYTES, Net, TextEncoder, Work
from flux_quant.planner.plan import Plan
from flux_quant.runtime import Memory, hoisted_globs, sizes_of, tensors_of
from flux_quant.streaming import BlockStreamer, StreamPlan, block_bytes, rings_for
from flux_quant.text.encode import LONGEST, TextOptions
from flux_quant.text.encoders import Placement

SCHNELL_LENGTH = 256  # tokens of T5 that [schnell] was trained with

Bring = Callable[[nn.Module], AbstractContextManager[object]]  # to the device, for as long as it lasts


class Placed(NamedTuple):
    plan: Plan | None = None  # None: everything is on the device at once
    bring: Bring | None = None  # how a ControlNet comes to the device, if not whole

    def given(self, given: Given) -> Given:
        controls = tuple(replace(control, bring=self.bring) for control in given.controls)
        return replace(given, controls=controls)


def planned(
    memory: Memory | None,
    components: Components,
    model: Flux,
    request: Request,
    text: TextOptions,
    compute: str,
    nets: Nets,
) -> Placed:
    """What is to be made, as a plan for this memory; said as it is made. ControlNets that do not fit whole stream."""
    if memory is None:
        return Placed()
    reader = open_component(components.t5, "T5 encoder")
    encoder = TextEncoder.of({name: (info.shape, info.format) for name, info in reader.tensors.items()})
    words = text.pad_to or (LONGEST if model.config.guidance else SCHNELL_LENGTH)
    work = Work(
        size=request.size,
        batch=len(request.all_seeds),
        words=words + (redux_length(request.redux) if request.redux else 0),
        steps=request.steps,
        passes=1 if request.negative is None else 2,
        compute="float" if compute == "16-bit" else compute,
        adapters=makes_outputs(model),
        reference=prod(reference_size(request)) // PATCH**2 if request.reference else 0,
    )
    sizes, item = sizes_of(model), BYTES[memory.machine.dtype]

    def plan_with(streamed: bool) -> Plan:
        tokens = work.batch * work.image_tokens
        held = device_bytes([net for _, net in nets], model.config, tokens, item, streamed)
        shares = (len(acting(asked.span, work.steps)) / work.steps for asked, _ in nets)
        beside = tuple(Net.of(tensors_of(net), share, streamed) for (_, net), share in zip(nets, shares, strict=True))
        return memory.plan(sizes, replace(work, controlnets=held, nets=beside), encoder)

    bring = None
    try:
        plan = plan_with(streamed=False)
    except UserError:
        if not nets:
            raise
        plan, bring = plan_with(streamed=True), streaming(memory)
        memory.log("ControlNets do not fit whole: their blocks pass through two slots each")
    memory.log(str(plan))
    return Placed(plan, bring)


def streaming(memory: Memory) -> Bring:
    """Blocks of a module pass through two slots, what is outside of them stays on the device meanwhile."""

    def bring(net: nn.Module) -> BlockStreamer:
        lists = ("double_blocks", "single_blocks")
        names = tuple(f"{name}.{i}" for name in lists for i in range(len(getattr(net, name))))
        sizes, _ = block_bytes(net, names, exclude=hoisted_globs(net))
        plan = StreamPlan(names, sizes, frozenset(), rings_for(sizes))
        return BlockStreamer(net, plan, memory.device, memory.ram_budget, exclude=hoisted_globs(net))

    return bring


def text_by(plan: Plan, memory: Memory, text: TextOptions) -> TextOptions:
    """T5 streamed through the device if the plan has it there and nobody placed it otherwise."""
    phase = next(phase for phase in plan.phases if phase.name == "text")
    if text.placement != Placement() or not phase.parts:
        return text
    native = memory.place.type == "cuda" and memory.machine.dtype == "bf16"
    placement = Placement(memory.place, "mixed" if native else "float32", attach=memory.streaming)
    return replace(text, placement=placement)


def room(memory: Memory | None, device: torch.device | str) -> int | None:
    """Bytes that encoding or decoding a picture may take."""
    return vae.free_memory(device) if memory is None else memory.free
