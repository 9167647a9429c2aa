"""Suite `image`: a prompt becomes a picture, with everything: loading, text, modulation, steps, decoding.

Formats take turns. The first picture of each, in which kernels are compiled and files come into the cache, is kept as
`first_seconds` and does not count. On CUDA blocks stay or stream as the planner says for the budget; a budget below
what the card has says what fits, not how fast a smaller card is. Energy is that of the card, by NVML, where it counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from flux_quant.benchmarks.bench import models
from flux_quant.benchmarks.bench.memory import Peaks, watched
from flux_quant.benchmarks.bench.models import SOURCE, Workshop
from flux_quant.benchmarks.bench.record import EMULATED, Row
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite, nothing
from flux_quant.benchmarks.bench.sweep import named_budget, named_size
from flux_quant.components import BUNDLED, Components, find_components, recommended_size
from flux_quant.converters.summary import summarize
from flux_quant.errors import UserError
from flux_quant.generation import Request, Result, generate
from flux_quant.runtime import Memory

FORMATS, QUICK = (SOURCE, "fp8", "q8_0", "q5_k_s", "q4_k_s"), (SOURCE, "q4_k_s")
STEPS = (4, 20)
PROMPT = "red fox on a white background"
WHOLE = 0.9  # of the card's memory: a budget below that emulates a smaller card


def cases(asked: Asked) -> Iterator[Case]:
    if asked.random:
        yield Case({"format": "random"}, no_encoders)
        return
    shop = Workshop("image")
    components = find_components(asked.model or BUNDLED)
    source = components.transformer
    formats = asked.formats or ((SOURCE,) if asked.model else QUICK if asked.quick else FORMATS)
    todo = [
        (size, steps, vram, name)
        for size in asked.sizes or (recommended_size(source),)
        for steps in asked.steps or (STEPS[:1] if asked.quick else STEPS)
        for vram in asked.vram or (None,)
        for name in formats
    ]
    for place in todo:
        size, steps, vram, name = place
        what = {"format": models.label(source, name), "size": named_size(size), "steps": steps}
        what |= {"vram": vram} if vram else {}
        work = Pictures(asked, components, shop, name, size, steps, vram)
        close = shop.close if place == todo[-1] else nothing
        yield Case(what, work, group=f"image {size} {steps} {vram}", close=close)


def no_encoders() -> Row:
    raise UserError("pictures need text encoders and a VAE: give --model, or leave --random out for the shipped model")


@dataclass
class Pictures:
    """The `work` of a case: a picture at every call, after one that does not count."""

    asked: Asked
    components: Components
    shop: Workshop
    format: str
    size: tuple[int, int]
    steps: int
    vram: int | None
    first: list[float] = field(default_factory=list)
    about: dict[str, object] = field(default_factory=dict)

    def __call__(self) -> Row:
        path = self.shop.converted(self.components.transformer, self.format)
        components = replace(self.components, transformer=path)
        if not self.first:
            summary = summarize(path)
            bits = 8 * summary.bytes / summary.parameters
            self.about = {"file_bytes": summary.bytes, "bits_per_weight": bits}
            began = [sum(self.draw(components)[0].seconds.values()) for _ in range(max(1, self.asked.warm))]
            self.first = began[:1]
            return self.row(*self.draw(components), first=self.first)
        return self.row(*self.draw(components))

    def draw(self, components: Components) -> tuple[Result, Peaks, Memory | None]:
        device = torch.device(self.asked.device)
        request = Request(PROMPT, steps=self.steps, size=self.size)
        memory = None
        if device.type == "cuda":
            memory = Memory.of(device, self.vram and named_budget(self.vram), log=lambda line: None)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with watched(device) as peaks:
            result = generate(components, request, device, dtype, memory=memory)
        return result, peaks, memory

    def row(self, result: Result, peaks: Peaks, memory: Memory | None, first: list[float] | None = None) -> Row:
        samples = {
            "seconds": [sum(result.seconds.values())],
            "step_seconds": [result.seconds["denoise"] / result.steps],
        }
        samples |= {f"{phase}_seconds": [seconds] for phase, seconds in result.seconds.items()}
        samples |= {"joules": [peaks.joules]} if peaks.joules is not None else {}
        samples |= {"first_seconds": first} if first else {}
        row = Row(samples=samples, values=dict(self.about), memory=peaks.memory)
        if memory is not None:
            row.values |= {"bytes_moved": result.metrics["total_bytes"], "stall_seconds": result.metrics["stall"]}
            row.memory["host_pinned"] = result.metrics["pinned_bytes"]
            row.expected = {"predicted_seconds": result.metrics["predicted_seconds"]}
            if self.vram and self.vram < WHOLE * memory.machine.total:
                row.status = EMULATED
        return row


SUITE = Suite("image", "pictures, end to end: seconds of each phase, memory, energy", cases)
