"""Modulation for all steps at once, before the loop.

A quarter of FLUX.1's weights, 3.25 of 11.9 billion, are linears on the steering vector: on timestep, guidance and
pooled text, never on the picture. Evaluated step by step they would be read from memory, or cross the bus, at every
step for a single row of input each. Here each is used once, for all steps: what it makes is kept, 2 MB a step in 16
bits, and the linears, with the embedders before them, need not be on the device while the picture is drawn.

    modulation = HoistedModulation(model)
    steps = modulation.rows([Call(timestep, pooled, guidance) for ...], "cuda", torch.bfloat16)
    model(..., steering=steps[0])

Any module works that has `embedders`, `steering` and parts with a `steered_linear`, as `model.Flux`.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = dict[nn.Module, Tensor]  # linear -> (B, N): a `model.StepModulation`
Key = tuple[bytes | None, ...]
KEPT = 128  # calls: 270 MB for FLUX.1 in 16 bits


class Steered(Protocol):
    """What is asked of a model beside being a module."""

    @property
    def embedders(self) -> Sequence[nn.Module]: ...

    def steering(self, pooled: Tensor, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


class Call(NamedTuple):
    """What steers one forward pass of B pictures. Values may differ from call to call and from picture to picture."""

    timestep: Tensor  # (B,)
    pooled: Tensor  # (B, pooled)
    guidance: Tensor | None = None  # (B,), for guided models


Visit = Callable[[nn.Module, torch.device], AbstractContextManager[None]]


@contextmanager
def visiting(module: nn.Module, device: torch.device, left: Sequence[nn.Module] = ()) -> Iterator[None]:
    """The module's weights, without those parts, lie on the device inside, as copies; then it has its own again."""
    stay = {id(part) for other in left for part in other.modules()}
    parts = [part for part in module.modules() if id(part) not in stay]
    tables = [table for part in parts for table in (part._parameters, part._buffers)]
    own = [(table, name, value) for table in tables for name, value in table.items() if value is not None]
    try:
        for table, name, value in own:
            if value.device != device:
                moved = value.detach().to(device)
                table[name] = nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
        yield
    finally:
        for table, name, value in own:
            table[name] = value


def steered_linears(model: Steered) -> list[nn.Module]:
    """The linears whose only input is the steering vector, in the order of the model."""
    return [part.steered_linear for part in model.modules() if hasattr(part, "steered_linear")]


def hoisted_modules(model: Steered) -> list[nn.Module]:
    """What a forward pass does not touch that is given its modulation."""
    return [*model.embedders, *steered_linears(model)]


def move_without_(model: nn.Module, device: torch.device | str, left: Sequence[nn.Module]) -> nn.Module:
    """`model.to(device)`, but these parts of it stay where they are."""
    stay = {id(part) for module in left for part in module.modules()}
    for part in model.modules():
        if id(part) not in stay:
            part._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


@torch.no_grad()
def evaluate(
    model: Steered, calls: Sequence[Call], device: torch.device | str, dtype: torch.dtype, visit: Visit = visiting
) -> list[Rows]:
    """The modulation of every call, on the device in `dtype`; each weight is used once, in the order of the model.

    `visit` brings one module to the device for the time of its use. Calls of B equal pictures take one row.
    """
    device = placed(device)
    calls = [together(call) for call in calls]
    sizes = [len(call.timestep) for call in calls]
    vec = steering_vectors(model, calls, device, dtype, visit)
    linears = steered_linears(model)
    ends = torch.tensor([0, *(linear.out_features for linear in linears)]).cumsum(0).tolist()
    table = torch.empty(len(vec), ends[-1], dtype=dtype, device=device)
    x = F.silu(vec)
    for linear, first, end in zip(linears, ends[:-1], ends[1:], strict=True):
        with visit(linear, device):
            table[:, first:end] = linear(x)
    pieces = [piece.split([linear.out_features for linear in linears], dim=1) for piece in table.split(sizes)]
    return [dict(zip(linears, piece, strict=True)) for piece in pieces]


def steering_vectors(
    model: Steered, calls: Sequence[Call], device: torch.device, dtype: torch.dtype, visit: Visit
) -> Tensor:
    """(M, D) for the M pictures of all calls in a row."""
    timestep, pooled = (torch.cat([call[i] for call in calls]).to(device) for i in (0, 1))
    guided = all(call.guidance is not None for call in calls)
    guidance = torch.cat([call.guidance for call in calls]).to(device) if guided else None
    with ExitStack() as visits:
        for embedder in model.embedders:
            visits.enter_context(visit(embedder, device))
        return model.steering(pooled, timestep.float(), guidance, dtype)


def placed(device: torch.device | str) -> torch.device:
    """As tensors name it: `cuda` is cuda:0, or whichever is current."""
    device = torch.device(device)
    return device if device.index is not None else torch.empty(0, device=device).device


def together(call: Call) -> Call:
    """One picture instead of B where all are steered alike."""
    given = [value for value in call if value is not None]
    return Call(*(value[:1] if value is not None else None for value in call)) if all(map(alike, given)) else call


def alike(values: Tensor) -> bool:
    return bool((values == values[:1]).all())


class HoistedModulation:
    """Remembers what was evaluated for which inputs, and evaluates what is missing.

    Inputs are compared by value, and so are the versions that adapters show. What was evaluated is forgotten when a
    linear of the model is exchanged, or an adapter on one comes or goes. Other changes of weights need `forget`.
    """

    def __init__(self, model: Steered, visit: Visit = visiting) -> None:
        self.model, self.visit = model, visit
        self.kept: OrderedDict[tuple, Rows] = OrderedDict()
        self.layers: list[tuple[object, ...]] = []
        self.evaluations = 0  # how often all weights were used

    def rows(
        self,
        calls: Sequence[Call],
        device: torch.device | str,
        dtype: torch.dtype,
        ahead: Callable[[], Sequence[Call]] = tuple,
    ) -> list[Rows]:
        """The modulation of every call, each tensor (B, N). What `ahead` gives is evaluated too if anything must be."""
        device = placed(device)
        now = layers_of(self.model)
        if not same(*([row[:2] for row in rows] for rows in (self.layers, now))):
            self.forget()
        self.layers = now
        versions = tuple(version for *_, version in now)
        names = [(*key(call), device, dtype, versions) for call in calls]
        if any(name not in self.kept for name in names):
            wanted = dict(zip(names, calls, strict=True))
            wanted |= {(*key(call), device, dtype, versions): call for call in ahead()}
            missing = {name: call for name, call in wanted.items() if name not in self.kept}
            found = evaluate(self.model, list(missing.values()), device, dtype, self.visit)
            self.kept |= dict(zip(missing, found, strict=True))
            self.evaluations += 1
        for name in names:
            self.kept.move_to_end(name)
        while len(self.kept) > max(KEPT, len(names)):
            self.kept.popitem(last=False)
        return [widened(self.kept[name], len(call.timestep)) for name, call in zip(names, calls, strict=True)]

    def stale(self) -> bool:
        """Whether the layers are others, or adapted otherwise, than when they were last used."""
        return not same(self.layers, layers_of(self.model))

    def forget(self) -> None:
        self.kept.clear()
        self.layers = layers_of(self.model)


def layers_of(model: Steered) -> list[tuple[object, ...]]:
    """Each layer, its adapters and what they show as their version."""
    parts = [part for module in hoisted_modules(model) for part in module.modules()]
    adapters = [tuple(getattr(part, "adapters", ())) for part in parts]
    versions = [tuple(getattr(adapter, "version", None) for adapter in group) for group in adapters]
    return [(part, group, version) for part, group, version in zip(parts, adapters, versions, strict=True)]


def same(before: Sequence[tuple[object, ...]], now: Sequence[tuple[object, ...]]) -> bool:
    """Modules and adapters are compared by identity, versions by value."""

    def mark(layers: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
        return [(id(part), tuple(map(id, group)), *version) for part, group, *version in layers]

    return mark(before) == mark(now)


def key(call: Call) -> Key:
    """The values of a call; pictures that are steered alike count once."""
    return tuple(None if v is None else v.detach().float().cpu().numpy().tobytes() for v in together(call))


def widened(rows: Mapping[nn.Module, Tensor], batch: int) -> Rows:
    """For B pictures where one row stands for all."""
    return {linear: row.expand(batch, -1) for linear, row in rows.items()}


def table_bytes(model: Steered, rows: int, dtype: torch.dtype) -> int:
    """What the modulation of that many rows (pictures steered differently, times steps) takes."""
    return rows * sum(linear.out_features for linear in steered_linears(model)) * dtype.itemsize


def hoisted_bytes(model: Steered) -> int:
    """Weights that need not be on the device."""
    tensors = (t for module in hoisted_modules(model) for t in (*module.parameters(), *module.buffers()))
    return sum(tensor.nbytes for tensor in tensors)
