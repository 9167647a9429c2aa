"""Packed weights and streamed blocks for models that we know nothing about.

    quantize_(model, "q8_0")                       linears of the blocks, in place
    with stream_(model, vram="6GB") as streamed:   blocks pass through the GPU; afterwards the model is what it was
        model(...)

What blocks are: see `blocks`. What lies outside of them stays as it is, and is on the GPU while the blocks stream.
"""

import warnings
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.frontends.blocks import block_names, choices
from flux_quant.frontends.plugins import attach_quantizer_, hide_weights_
from flux_quant.linear import quantize_module_
from flux_quant.planner.footprint import CONTEXT
from flux_quant.planner.memory import Budget, amount, parse_amount
from flux_quant.streaming import BlockStreamer, StreamMetrics, StreamPlan, block_bytes, pin_budget, rings_for
from flux_quant.streaming.device import StreamDevice
from flux_quant.streaming.plan import spread_evenly


@torch.no_grad()
def quantize_(module: nn.Module, format_name: str = "q8_0", keep: Iterable[str] = ()) -> dict[str, str]:
    """Pack the linears of a model's blocks, in place -> name of each packed layer: its format.

    format_name: a row of FORMATS; a layer whose inputs are no multiple of its block gets the next one that fits. keep:
    globs on names of layers that stay. Without blocks all linears are packed. Models of diffusers and transformers can
    be saved afterwards by `save_pretrained` (see `plugins`). UserError for a format that does not exist, and where
    there is nothing to pack.
    """
    if format_name not in FORMATS:
        raise UserError(f"format {format_name} is unknown; choose one of {', '.join(FORMATS)}")
    keep = tuple(keep)
    replaced = quantize_module_(module, choices(module, format_name, keep).items())
    if not replaced:
        raise UserError(f"{type(module).__name__} has no linear layer to pack, or they are packed already")
    hide_weights_(module)
    attach_quantizer_(module, format_name, keep)
    return replaced


class Streamed:
    """A model whose blocks stream until `close`. Inputs are moved to the device, the result to where the first was."""

    def __init__(self, module: nn.Module, streamer: BlockStreamer | None) -> None:
        self.module, self.streamer = module, streamer
        self.home = torch.device("cpu")
        self.hooks = []
        if streamer is not None:
            self.hooks = [
                module.register_forward_pre_hook(self.bring, with_kwargs=True),
                module.register_forward_hook(self.give),
            ]

    def bring(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.home = given[0].device if given else self.home
        return tree_map(to(self.streamer.device.device), (args, kwargs))

    def give(self, _: nn.Module, args: tuple, result: object) -> object:
        return tree_map(to(self.home), result)

    @property
    def plan(self) -> StreamPlan | None:
        """What stays and what moves; None where everything is on the CPU."""
        return self.streamer and self.streamer.plan

    def metrics(self) -> StreamMetrics | None:
        return self.streamer and self.streamer.metrics()

    def close(self) -> None:
        """The module as it was: the same tensors on the same devices, no hooks."""
        for hook in self.hooks:
            hook.remove()
        if self.streamer is not None:
            self.streamer.detach()

    def __enter__(self) -> "Streamed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def to(device: torch.device) -> Callable[[object], object]:
    return lambda value: value.to(device) if isinstance(value, Tensor) else value


def stream_(
    module: nn.Module,
    vram: str,
    ram: str | None = None,
    activations: str = "1GB",
    device: str | torch.device | StreamDevice = "auto",
) -> Streamed:
    """Let a model's blocks stream within a budget; inference only -> what ends it, also a context manager.

    vram: the most to take on the GPU; `activations` of it are left for what passes through the blocks, which nothing
    tells beforehand. Blocks for which there is room stay, spread evenly; the others pass through slots. ram: the most
    to pin. "auto" is the GPU if there is one; without one nothing streams, which is warned of. UserError if one block
    and what lies outside of the blocks do not fit, with what is needed.
    """
    names = block_names(module)
    if not names:
        raise UserError(f"{type(module).__name__} has no list of blocks of one type: nothing in it can stream")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device in ("cpu", torch.device("cpu")):
        warnings.warn(f"vram={vram} is about a CUDA GPU; on the CPU nothing streams", stacklevel=2)
        return Streamed(module, None)
    pinned = None if ram is None else min(pin_budget(), parse_amount(ram, "RAM budget"))
    sizes, rest = block_bytes(module, names)
    plan = plan_for(names, sizes, rest, room_of(device, vram, parse_amount(activations, "activations")))
    return Streamed(module, BlockStreamer(module, plan, device, pinned))


def room_of(device: str | torch.device | StreamDevice, vram: str, activations: int) -> int:
    """Bytes for weights."""
    if not isinstance(device, str | torch.device):
        return parse_amount(vram, "budget") - activations
    budget = Budget.of(vram, torch.cuda.mem_get_info(torch.device(device))[0], "free memory of this GPU")
    return budget.nbytes - CONTEXT - activations


def plan_for(names: list[str], sizes: tuple[int, ...], rest: int, room: int) -> StreamPlan:
    """As many blocks as fit beside the rest and the slots stay; a second slot comes before any of them."""
    room -= rest
    for slots in (2, 1):
        for count in range(len(names), -1, -1):
            stay = frozenset(spread_evenly(count, len(names)))
            rings = rings_for([size for i, size in enumerate(sizes) if i not in stay], slots)
            if sum(sizes[i] for i in stay) + sum(ring.nbytes for ring in rings) <= room:
                return StreamPlan(tuple(names), sizes, stay, rings)
    least = sum(ring.nbytes for ring in rings_for(sizes, 1))
    raise UserError(
        f"{amount(max(0, room + rest))} are left for weights; one slot for each size of block takes {amount(least)}, "
        f"what lies outside of the blocks {amount(rest)}: a larger budget, fewer activations, or quantize_ first"
    )
