"""ControlNets: short copies of FLUX.1 that see a hint beside the noise and add to what the model's blocks make.

A net gives one residual for each of its own blocks; a model has more blocks than that, so each residual serves several
of them: those in a row, or, for XLabs' nets, every n-th. With 19 double blocks and 6 residuals each serves 4, and the
sixth none: such dead blocks are told from the counts and never loaded.

    net = load_controlnet(path, model.config)
    control = Control(net, condition, scale=0.9, span=(0.0, 0.8))
    denoise(model, replace(drawing, controls=(control,)))

Matches diffusers' `FluxControlNetModel` and `FluxMultiControlNetModel`; Alimama's inpainting nets differ from it in
the width of the condition only.

Letters: B batch, S image tokens, T text tokens, D hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_quant.arch import FluxConfig, count_blocks
from flux_quant.errors import UserError
from flux_quant.model import (
    TIME_CHANNELS,
    DoubleBlock,
    Embedder,
    Flux,
    Residuals,
    SingleBlock,
    Steering,
    finite,
    pack_latents,
    rotary_angles,
)
from flux_quant.modulation import Call, HoistedModulation, Rows, hoisted_modules, visiting
from flux_quant.naming import Shape

INPAINTING = 68  # channels of a token of the condition: 4 patches of 16 latents and the mask (Alimama)
MODES = {  # of InstantX' Union nets
    name: number for number, name in enumerate(("canny", "tile", "depth", "blur", "pose", "gray", "low-quality"))
}
HINT_WIDTH = 16


@dataclass(frozen=True)
class ControlNetConfig:
    """Dimensions of a net, and how many of its blocks a model of a given depth reads."""

    flux: FluxConfig  # the blocks that are loaded
    condition: int  # channels of a token of the condition
    outputs: tuple[int, int]  # residuals of double and of single blocks that are read
    modes: int = 0  # kinds of hints that a Union net tells apart
    from_pixels: bool = False  # the hint goes through convolutions of the net's own, not through the VAE
    repeats: bool = False  # residuals take turns (XLabs) instead of serving blocks in a row

    @property
    def inpaints(self) -> bool:
        return self.condition == INPAINTING

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape], base: FluxConfig) -> "ControlNetConfig":
        """From the names in `ControlNet` and the model that the net is for. UserError if they do not go together."""
        last = {"final_layer.linear.weight": shapes.get("img_in.weight", ())[::-1]}  # a net has none; the same channels
        own = FluxConfig.from_shapes({**shapes, **last})
        check_base(own, base)
        kinds = ("controlnet_blocks.", base.double_blocks), ("controlnet_single_blocks.", base.single_blocks)
        repeats = "input_hint_block.conv_in.weight" in shapes
        outputs = tuple(live(blocks, count_blocks(shapes, prefix), repeats) for prefix, blocks in kinds)
        double = own.double_blocks if outputs[1] else outputs[0]  # single blocks see what all double ones made
        return cls(
            flux=replace(own, double_blocks=double, single_blocks=outputs[1]),
            condition=shapes["controlnet_x_embedder.weight"][1],
            outputs=outputs,
            modes=shapes.get("controlnet_mode_embedder.weight", (0,))[0],
            from_pixels=repeats,
            repeats=repeats,
        )


def check_base(own: FluxConfig, base: FluxConfig) -> None:
    names = {"hidden": "width", "head_dim": "channels of a head", "context": "T5 width", "pooled": "CLIP width"}
    for field_name, what in names.items():
        here, there = getattr(own, field_name), getattr(base, field_name)
        if here != there:
            raise UserError(f"a ControlNet for other models: its {what} is {here}, that of the model {there}")
    if own.in_channels != base.out_channels:
        raise UserError(f"a ControlNet for latents of {own.in_channels} channels, the model has {base.out_channels}")


def turns(blocks: int, outputs: int, repeats: bool) -> list[int]:
    """Which residual each block of the model gets."""
    interval = -(-blocks // outputs)
    return [block % outputs if repeats else block // interval for block in range(blocks)]


def live(blocks: int, outputs: int, repeats: bool = False) -> int:
    """How many of the residuals the model reads. As many are left when the others are not loaded: `turns` agrees."""
    return 1 + max(turns(blocks, outputs, repeats)) if outputs and blocks else 0


def served(samples: Sequence[Tensor], blocks: int, repeats: bool = False) -> list[Tensor]:
    """The residual of each block of the model, from those that a net gives."""
    return [samples[i] for i in turns(blocks, len(samples), repeats)] if samples else []


class Hint(nn.Module):
    """Pixels to 16 channels at an eighth of the size: 8 convolutions with SiLU between them, three of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, HINT_WIDTH, 3, padding=1)
        strides = (1, 2) * 3
        self.blocks = nn.ModuleList(nn.Conv2d(HINT_WIDTH, HINT_WIDTH, 3, padding=1, stride=s) for s in strides)
        self.conv_out = nn.Conv2d(HINT_WIDTH, HINT_WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in -1 to 1 -> (B, 16, H / 8, W / 8)."""
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        return self.conv_out(x)


class Joined(nn.Module):
    """Linears on one input, their outputs side by side: q, k and v whose packed weights do not become one."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class ControlNet(nn.Module):
    """Build it on the meta device to load weights into it: see `flux_quant.loading.load_controlnet`."""

    embedders = Flux.embedders
    steering = Flux.steering

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        flux, (double, single) = config.flux, config.outputs
        self.img_in = nn.Linear(flux.in_channels, flux.hidden)
        self.txt_in = nn.Linear(flux.context, flux.hidden)
        self.time_in = Embedder(TIME_CHANNELS, flux.hidden)
        self.vector_in = Embedder(flux.pooled, flux.hidden)
        self.guidance_in = Embedder(TIME_CHANNELS, flux.hidden) if flux.guidance else None
        self.input_hint_block = Hint() if config.from_pixels else None
        self.controlnet_x_embedder = nn.Linear(config.condition, flux.hidden)
        self.controlnet_mode_embedder = nn.Embedding(config.modes, flux.hidden) if config.modes else None
        self.double_blocks = nn.ModuleList(DoubleBlock(flux) for _ in range(flux.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(flux) for _ in range(flux.single_blocks))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(flux.hidden, flux.hidden) for _ in range(double))
        self.controlnet_single_blocks = nn.ModuleList(nn.Linear(flux.hidden, flux.hidden) for _ in range(single))

    def forward(
        self,
        img: Tensor,
        condition: Tensor,
        txt: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        steering: Steering,
        mode: int | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The residuals of its double and of its single blocks, (B, S, D) each.

        img (B, S, channels) and txt (B, T, context) as the model gets them; condition (1 or B, S, channels) tokens of
        the hint; steering as in `Flux.forward`; mode, for Union nets, becomes one more token of text.
        """
        img, txt = self.img_in(img) + self.controlnet_x_embedder(condition.to(img.dtype)), self.txt_in(txt)
        if self.controlnet_mode_embedder is not None:
            token = self.controlnet_mode_embedder(torch.tensor([mode], device=img.device)).to(txt.dtype)
            txt = torch.cat([token.expand(len(txt), 1, -1), txt], dim=1)
            txt_ids = torch.cat([txt_ids[:1], txt_ids])
        cos, sin = rotary_angles(torch.cat([txt_ids, img_ids]), self.config.flux.rope_axes)
        double, single = [], []
        for i, block in enumerate(self.double_blocks):
            img, txt = block(img, txt, steering, cos, sin)
            if i < len(self.controlnet_blocks):
                double.append(self.controlnet_blocks[i](img))
        x = torch.cat([txt, img], dim=1) if self.single_blocks else img
        for block, project in zip(self.single_blocks, self.controlnet_single_blocks, strict=True):
            x = block(x, steering, cos, sin)
            single.append(project(x[:, txt.shape[1] :]))
        return double, single

    def tokens(self, pixels: Tensor) -> Tensor:
        """The condition (B, S, 64) of a hint (B, 3, H, W) in -1 to 1, for nets with convolutions of their own."""
        return pack_latents(self.input_hint_block(pixels))

    def number_of(self, mode: str | None) -> int | None:
        """Of a mode by its name or number. UserError for one that this net lacks, or if a Union net gets none."""
        count = self.config.modes
        if not count:
            if mode is not None:
                raise UserError(f"a mode ({mode}) is for Union nets; this one knows one kind of hint only")
            return None
        known = [name for name, number in MODES.items() if number < count]
        number = MODES.get(mode, int(mode) if mode and mode.isdecimal() else count)
        if number >= count:
            raise UserError(f"a Union net needs a mode it knows: {', '.join(known)} or a number below {count}")
        return number


@dataclass(frozen=True)
class Control:
    """What a net contributes to a drawing."""

    net: ControlNet
    condition: Tensor  # (1 or B, S, channels)
    scale: float = 1.0
    span: tuple[float, float] = (0.0, 1.0)  # where it acts, in parts of the steps
    mode: int | None = None
    bring: Callable[[nn.Module], AbstractContextManager[object]] | None = None  # to the device; None: whole
    modulation: HoistedModulation = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modulation", HoistedModulation(self.net))

    def acting(self, steps: int) -> list[int]:
        """The steps that lie in its span as a whole, as in diffusers."""
        return acting(self.span, steps)


def acting(span: tuple[float, float], steps: int) -> list[int]:
    return [step for step in range(steps) if step / steps >= span[0] and (step + 1) / steps <= span[1]]


CallsOf = Callable[[bool], list[list[Call]]]  # whether guided -> the calls of each step


class Controls:
    """The nets of a drawing at work. Each is on the device from its first step to its last, without its modulation."""

    def __init__(
        self, controls: Sequence[Control], base: FluxConfig, calls: CallsOf, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.controls, self.base, self.device = controls, base, device
        self.rows = [rows_of(control, calls, device, dtype) for control in controls]
        self.present: dict[ControlNet, ExitStack] = {}

    def residuals(self, step: int, number: int, inputs: Mapping[str, Tensor]) -> Residuals:
        """In pass `number` of a step, whose inputs are those of the model; of wider ones a net reads the latents."""
        parts = []
        for i, control in enumerate(self.controls):
            if step not in self.rows[i]:
                continue
            self.bring(control)
            given = {name: inputs[name] for name in ("txt", "img_ids", "txt_ids")}
            given["img"] = inputs["img"][..., : control.net.config.flux.in_channels]
            steering = self.rows[i][step][number]
            parts.append(
                (control, control.net(condition=control.condition, **given, steering=steering, mode=control.mode))
            )
        return Residuals(
            combined([(c, double) for c, (double, _) in parts], self.base.double_blocks),
            combined([(c, single) for c, (_, single) in parts], self.base.single_blocks),
        )

    def bring(self, control: Control) -> None:
        net = control.net
        if net not in self.present:
            whole = visiting(net, self.device, hoisted_modules(net)) if control.bring is None else None
            self.present[net] = ExitStack()
            self.present[net].enter_context(whole or control.bring(net))

    def after(self, step: int) -> None:
        """Nets that have no further step leave the device."""
        later = {c.net for c, rows in zip(self.controls, self.rows, strict=True) if any(i > step for i in rows)}
        for net in [net for net in self.present if net not in later]:
            self.present.pop(net).close()

    def __enter__(self) -> "Controls":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stack in self.present.values():
            stack.close()
        self.present.clear()


def device_bytes(
    controls: Sequence[ControlNet], base: FluxConfig, tokens: int, item: int, streamed: bool = False
) -> int:
    """What nets take while they act: weights, each once, and residuals of so many tokens, with their sums.

    streamed: blocks of each kind pass through two slots.
    """
    made = [sum(net.config.outputs) for net in controls]
    summed = min(base.double_blocks + base.single_blocks, sum(made)) if len(made) > 1 else 0
    weights = sum(weight_bytes(net, streamed) for net in dict.fromkeys(controls))
    return weights + (sum(made) + summed) * tokens * base.hidden * item


def weight_bytes(net: ControlNet, streamed: bool) -> int:
    """Without the modulation."""
    left = {id(x) for part in hoisted_modules(net) for x in (*part.parameters(), *part.buffers())}

    def nbytes(module: nn.Module) -> int:
        return sum(x.nbytes for x in (*module.parameters(), *module.buffers()) if id(x) not in left)

    if not streamed:
        return nbytes(net)
    kinds = [[nbytes(block) for block in blocks] for blocks in (net.double_blocks, net.single_blocks) if blocks]
    return nbytes(net) - sum(map(sum, kinds)) + sum(min(2, len(kind)) * max(kind) for kind in kinds)


def rows_of(control: Control, calls: CallsOf, device: torch.device, dtype: torch.dtype) -> dict[int, list[Rows]]:
    """step -> the modulation of each pass, for the steps in which a net acts; evaluated in one go."""
    by_step = calls(control.net.config.flux.guidance)
    acting = control.acting(len(by_step))
    rows = iter(control.modulation.rows([call for step in acting for call in by_step[step]], device, dtype))
    return {step: [next(rows) for _ in by_step[step]] for step in acting}


def combined(parts: Sequence[tuple[Control, Sequence[Tensor]]], blocks: int) -> list[Tensor]:
    """The sum of all nets for each block of the model; blocks that get the same share one tensor. [] for none."""
    parts = [(control, samples) for control, samples in parts if samples]
    served = [turns(blocks, len(samples), control.net.config.repeats) for control, samples in parts]
    sums: dict[tuple[int, ...], Tensor] = {}
    for chosen in zip(*served, strict=True):
        if chosen not in sums:
            terms = (scaled(samples[i], c.scale) for i, (c, samples) in zip(chosen, parts, strict=True))
            sums[chosen] = finite(reduce(add, terms))
    return [sums[chosen] for chosen in zip(*served, strict=True)]


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale
