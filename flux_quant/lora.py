"""LoRAs beside a model's weights: put on, turned up and down, exchanged and taken off, on any packed format.

    lora = read_lora("style.safetensors", shapes)          (converters.lora_io)
    apply_(model, [(lora, 0.8)])                           in place of whatever was on
    set_strength_(model, 0, 0.5)                           scalars only: no tensor is touched
    remove_(model)                                         the model is what it was

A strength may depend on the step: a list, whose last value holds on, or a function of the step from 0; `at_step_` sets
what is due. Linears get a side path (`adapters`); new norm scales, and weights that a file replaces, are exchanged for
the time. What cannot be right is a UserError with file and key, and the model is as it was before. A streamed model has
to be taken out of its streamer first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Real

import torch
from torch import Tensor, nn

from flux_quant.adapters import Dial, SidePath
from flux_quant.converters.lora_math import check_fit, replaced
from flux_quant.converters.lora_names import TRANSFORMER
from flux_quant.converters.lora_records import Lora, Record
from flux_quant.converters.lora_report import check_complete, key_of
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.kernels import dispatch
from flux_quant.linear import QuantLinear
from flux_quant.side_paths import SidePathBuilder, Sourced

Strength = float | Sequence[float] | Callable[[int], float]

APPLIED = "applied_loras"  # attribute of the model


@dataclass(eq=False)
class Exchange:
    """A norm's scale or bias while LoRAs are on."""

    module: nn.Module
    name: str
    own: nn.Parameter
    base: Tensor  # what changes are added to
    changes: list[tuple[int, Tensor]]
    held: nn.Parameter

    def update_(self, strengths: Sequence[float]) -> None:
        value = self.base.clone()
        for source, change in self.changes:
            value.add_(change.to(value), alpha=strengths[source])
        self.held.data.copy_(value)


@dataclass(eq=False)
class Applied:
    """What `apply_` put on a model."""

    model: nn.Module
    loras: tuple[Lora, ...]
    strengths: list[Strength]
    dial: Dial
    paths: dict[str, tuple[QuantLinear, SidePath]] = field(default_factory=dict)  # by module
    exchanges: list[Exchange] = field(default_factory=list)
    weights: list[tuple[QuantLinear, tuple, tuple]] = field(default_factory=list)  # layer, own and new (format, parts)
    wide: int = 0  # inputs of img_in, if more than the model's

    @property
    def nbytes(self) -> int:
        """Of all factors."""
        return sum(path.nbytes for _, path in self.paths.values())

    @property
    def scheduled(self) -> bool:
        return not all(isinstance(strength, Real) for strength in self.strengths)

    def values_at(self, step: int) -> list[float]:
        return [at(strength, step) for strength in self.strengths]

    def turn_(self, step: int = 0) -> None:
        self.dial.values = self.values_at(step)

    def attach(self) -> None:
        for layer, _, new in self.weights:
            layer.replace_parts(*new)
        for layer, path in self.paths.values():
            layer.adapters.append(path)
        for exchange in self.exchanges:
            setattr(exchange.module, exchange.name, exchange.held)
        if self.wide:
            self.own_config, self.model.config = self.model.config, replace(self.model.config, in_channels=self.wide)
        vars(self.model)[APPLIED] = self

    def detach(self) -> None:
        for layer, path in self.paths.values():
            layer.adapters.remove(path)
        for layer, (fmt, parts), _ in self.weights:
            device = layer.parts[0].device  # the model may have been moved since
            layer.replace_parts(fmt, tuple(part.to(device) for part in parts))
        for exchange in self.exchanges:
            exchange.own.data = exchange.own.data.to(getattr(exchange.module, exchange.name))
            setattr(exchange.module, exchange.name, exchange.own)
        if self.wide:
            self.model.config = self.own_config
        del vars(self.model)[APPLIED]


def applied_to(model: nn.Module) -> Applied | None:
    return vars(model).get(APPLIED)


@torch.no_grad()
def apply_(
    model: nn.Module,
    loras: Sequence[tuple[Lora, Strength]],
    component: str = TRANSFORMER,
    dtype: torch.dtype | None = None,
) -> Applied | None:
    """Put the changes of these files for a component on its model, instead of those that were on.

    dtype: of the factors, best that of the activations; None is the file's. Keys without a place are not an error
    here: see `lora_report`. None if the files change nothing of this component.
    """
    before = applied_to(model)
    if before:
        before.detach()
    try:
        applied = build(model, loras, component, dtype)
    except BaseException:
        if before:
            before.attach()
        raise
    if not (applied.paths or applied.exchanges or applied.weights):
        return None
    applied.attach()
    return applied


def remove_(model: nn.Module) -> None:
    """The model as it was before any LoRA."""
    if applied := applied_to(model):
        applied.detach()


def set_strength_(model: nn.Module, number: int, strength: Strength) -> None:
    """Of the file with this number, in the order in which they were given. UserError for what is no strength."""
    applied = applied_to(model)
    if applied is None or not 0 <= number < len(applied.loras):
        raise UserError(f"there is no LoRA number {number} on this model")
    check_strength(applied.loras[number], strength)
    check_schedule(applied.loras[number], strength, applied.exchanges, number)
    applied.strengths[number] = strength
    applied.turn_()
    for exchange in applied.exchanges:
        if any(source == number for source, _ in exchange.changes):
            exchange.update_(applied.dial.values)


def at_step_(model: nn.Module, step: int) -> None:
    """Turn strengths that depend on the step to those of this one, from 0."""
    applied = applied_to(model)
    if applied and applied.scheduled:
        applied.turn_(step)


def steps_by_strength(model: nn.Module, steps: int) -> list[list[int]]:
    """The steps in groups of equal strengths."""
    applied = applied_to(model)
    groups: dict[tuple[float, ...], list[int]] = {}
    for step in range(steps):
        groups.setdefault(tuple(applied.values_at(step)) if applied else (), []).append(step)
    return list(groups.values())


def tensors_by_module(model: nn.Module) -> dict[str, list[Tensor]]:
    """Factors by the module that they belong to."""
    applied = applied_to(model)
    return {name: path.tensors for name, (_, path) in applied.paths.items()} if applied else {}


def makes_outputs(model: nn.Module) -> bool:
    """Whether an adapter allocates an output of its own beside that of its layer, as all but plain LoRAs may."""
    applied = applied_to(model)
    return bool(applied) and any(
        path.others or path.row_gains or path.column_gains for _, path in applied.paths.values()
    )


def tensors_by_block(
    model: nn.Module, blocks: Iterable[str], left: Iterable[nn.Module] = ()
) -> tuple[dict[str, list[Tensor]], list[SidePath]]:
    """Factors of each block, and the side paths outside of all blocks; without those of the modules `left`."""
    applied, blocks, stay = applied_to(model), tuple(blocks), {id(part) for m in left for part in m.modules()}
    inside: dict[str, list[Tensor]] = {}
    outside = []
    for name, (layer, path) in (applied.paths if applied else {}).items():
        if id(layer) in stay:
            continue
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            outside.append(path)
        else:
            inside.setdefault(block, []).extend(path.tensors)
    return inside, outside


# --- Strengths --------------------------------------------------------------------------------------------------------


def at(strength: Strength, step: int) -> float:
    if isinstance(strength, Real):
        return float(strength)
    return float(strength(step) if callable(strength) else strength[min(step, len(strength) - 1)])


def check_strength(lora: Lora, strength: Strength) -> None:
    values = [strength] if isinstance(strength, Real) else [] if callable(strength) else strength
    listed = isinstance(values, Sequence) and not isinstance(values, str) and (values or callable(strength))
    if not listed or not all(isinstance(value, Real) and isfinite(value) for value in values):
        raise UserError(f"{lora.path}: strength {strength!r} is not a number, nor a list or function of the step")


def check_schedule(lora: Lora, strength: Strength, exchanges: Iterable[Exchange], number: int) -> None:
    if not isinstance(strength, Real) and any(source == number for e in exchanges for source, _ in e.changes):
        raise UserError(f"{lora.path} changes norms: its strength must be one number for all steps")


# --- From records to what is put on -----------------------------------------------------------------------------------


def build(
    model: nn.Module, loras: Sequence[tuple[Lora, Strength]], component: str, dtype: torch.dtype | None
) -> Applied:
    """Everything checked and computed, nothing changed."""
    for lora, strength in loras:
        check_strength(lora, strength)
        check_complete(lora)
    strengths = [strength for _, strength in loras]
    applied = Applied(model, tuple(lora for lora, _ in loras), strengths, Dial())
    applied.turn_()
    table: dict[str, list[tuple[int, Lora, Record]]] = {}
    for number, lora in enumerate(applied.loras):
        for record in lora.records:
            if record.component == component:
                check_finite(lora, record)
                table.setdefault(record.module, []).append((number, lora, record))
        applied.wide = max(applied.wide, *lora.widths.values(), 0) if component == TRANSFORMER else 0
    for name, changes in table.items():
        module = find_module(model, name, changes[0])
        if isinstance(module, QuantLinear):
            add_linear(applied, name, module, changes, dtype)
        else:
            add_norm(applied, name, module, changes)
    return applied


def find_module(model: nn.Module, name: str, change: tuple[int, Lora, Record]) -> nn.Module:
    """By its name; CLIP's have a first part in some versions of transformers, T5's output linear lies in a wrapper."""
    for text in (name, name.removeprefix("text_model.")):
        try:
            module = model.get_submodule(text)
        except AttributeError:
            continue
        return getattr(module, "inner", module)
    _, lora, record = change
    raise UserError(f"{lora.path}: {record.sources[0]} changes {name}, which this model does not have")


def check_finite(lora: Lora, record: Record) -> None:
    parts = {**record.factors, "magnitude": record.magnitude, "bias": record.bias}
    for name, tensor in parts.items():
        if tensor is not None and not tensor.isfinite().all():
            raise UserError(f"{lora.path}: {key_of(record, name)} holds values that are not finite")
    if not isfinite(record.scale):
        raise UserError(f"{lora.path}: the scale of {record.sources[0]} is {record.scale}")


def add_norm(applied: Applied, name: str, module: nn.Module, changes: Sourced) -> None:
    for parameter in ("scale", "weight", "bias"):
        own = module._parameters.get(parameter)
        rows = [row for row in changes if row[2].changes("bias" if parameter == "bias" else "weight")]
        if own is None or not rows:
            continue
        table = own.detach().float()[:, None]
        for _, lora, record in rows:
            check_fit(lora, record, f"{name}.{parameter}", table.shape)
        if parameter == "bias":
            added = [(number, record.bias) for number, _, record in rows]
        else:
            table = replaced(f"{name}.{parameter}", table, [(lora, record, 1.0) for _, lora, record in rows])
            other = ((number, record) for number, _, record in rows if record.kind != "set")
            added = [(number, record.scale * record.factors["value"][:, 0].float()) for number, record in other]
        held = nn.Parameter(own.detach().clone(), requires_grad=False)
        exchange = Exchange(module, parameter, own, table[:, 0].clone(), added, held)
        for number, lora, _ in rows:
            check_schedule(lora, applied.strengths[number], [exchange], number)
        exchange.update_(applied.dial.values)
        applied.exchanges.append(exchange)


def add_linear(applied: Applied, name: str, layer: QuantLinear, changes: Sourced, dtype: torch.dtype | None) -> None:
    wide = max(layer.in_features, *(lora.widths.get(name, 0) for _, lora, _ in changes))
    for _, lora, record in changes:
        check_fit(lora, record, f"{name}.weight", torch.Size((layer.out_features, wide)))
    if any(record.kind == "set" for _, _, record in changes):
        weight = dispatch.dequantize(layer.fmt, layer.parts, torch.float32)
        weight = replaced(f"{name}.weight", weight, [(lora, record, 1.0) for _, lora, record in changes])
        applied.weights.append((layer, (layer.fmt, layer.parts), (FORMATS["f32"], (weight,))))
    else:
        weight = None
    path = SidePathBuilder(layer, weight, wide, dtype).build(changes, applied.dial)
    if path.sources:
        applied.paths[name] = layer, path


def shapes_in(model: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, weights unpacked: what `read_lora` compares a file with."""
    found: dict[str, tuple[int, ...]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            found[f"{path}.weight"] = layer.out_features, layer.in_features
        for name, tensor in layer.named_parameters(recurse=False):
            found[f"{path}.{name}"] = tuple(tensor.shape)
    return found
