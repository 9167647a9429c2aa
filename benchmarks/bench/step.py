"""Suite `step`: one step of the transformer, by format and, on CUDA, by budget.

On a processor a step is one pass of the model in float32, formats in turns: of the shipped or the user's model, or with
--random of one of full size, where RAM holds it. On CUDA it is measured as by `benchmarks.streaming`: full-size random
weights, or the user's file, stay in RAM behind one streamer; without a limit and under each budget the planner's plan
is carried out, its modulation evaluated before. A budget below what the card has says what fits, not how fast.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks import streaming
from flux_quant.benchmarks.bench import models
from flux_quant.benchmarks.bench.limits import OTHERS
from flux_quant.benchmarks.bench.memory import watched
from flux_quant.benchmarks.bench.models import SOURCE, Workshop
from flux_quant.benchmarks.bench.prepared import Prepared
from flux_quant.benchmarks.bench.record import EMULATED, Row, Scalar
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite, nothing
from flux_quant.benchmarks.bench.sweep import named_budget, named_size
from flux_quant.benchmarks.bench.tiers import operations
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE, random_flux
from flux_quant.benchmarks.stage import Stage, open_stage
from flux_quant.benchmarks.step import SMALL, WORDS, inputs
from flux_quant.components import recommended_size
from flux_quant.converters.mixes import ALIASES, BASES
from flux_quant.converters.summary import summarize
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS as CODECS
from flux_quant.loading import load_flux
from flux_quant.model import Flux
from flux_quant.planner.doctor import ram_now
from flux_quant.planner.footprint import Work
from flux_quant.runtime import sizes_of

FORMATS, QUICK = (SOURCE, "fp8", "q8_0", "q6_k", "q5_k_s", "q4_k_s", "q4_0"), (SOURCE, "q4_k_s")
RANDOM, BUDGETS, SIZES = ("q8_0", "q4_k_s", "bf16"), (4, 6, 8, 10, 12, 16), ((1024, 1024), (512, 512))
WORDS_OF_SHIPPED = 64
WHOLE = 0.9  # of the card's memory: a budget below that emulates a smaller card


def cases(asked: Asked) -> Iterator[Case]:
    if torch.device(asked.device).type == "cuda":
        yield from on_cuda(asked)
    elif asked.random:
        yield from full_size(asked)
    else:
        yield from on_cpu(asked)


def weights(asked: Asked) -> dict[str, Scalar]:
    """On CUDA random ones of full size stand for the shipped model, which is too small to tell anything."""
    on_cuda = torch.device(asked.device).type == "cuda"
    return models.weights_of(replace(asked, random=asked.random or on_cuda and asked.model is None))


def bulk(recipe: str) -> str:
    """The format of most weights under a recipe."""
    return BASES.get(ALIASES.get(recipe, recipe), recipe)


# --- On a processor ---------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """The `work` of a case: a pass at every call, after `warm` that do not count."""

    load: Callable[[], Flux]
    about: Callable[[Flux], Row]  # the row without samples
    size: tuple[int, int]
    words: int
    warm: int
    passes: int = 1  # in a call
    state: Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.state = Prepared(self.begin)

    def begin(self) -> tuple[Flux, tuple, Row]:
        model = self.load()
        arguments = inputs(model.config, self.size, self.words, torch.device("cpu"), torch.float32)
        for _ in range(self.warm):
            model(*arguments)
        return model, arguments, self.about(model)

    @torch.inference_mode()
    def __call__(self) -> Row:
        model, arguments, about = self.state.get()
        samples = []
        for _ in range(self.passes):
            start = perf_counter()
            model(*arguments)
            samples.append(perf_counter() - start)
        return Row(samples={"seconds": samples}, values=dict(about.values), expected=dict(about.expected))


def bound(asked: Asked, model: Flux, size: tuple[int, int], words: int) -> dict[str, object]:
    """The operations of linears and attention at the rate of this processor's products."""
    rate = (asked.limits.get("cpu_tflop_per_s") or {}).get("fp32")
    if not rate:
        return {}
    seconds = sum(operations(sizes_of(model), Work(size=size, words=words))) / rate / 1e12
    return {"bound_seconds": seconds, "bound_by": "compute"}


def on_cpu(asked: Asked) -> Iterator[Case]:
    """Of a file, in its own format and in others."""
    source, shop = models.transformer(asked), Workshop("step")
    words = WORDS_OF_SHIPPED if asked.model is None else WORDS
    formats = asked.formats or ((SOURCE,) if asked.model else QUICK if asked.quick else FORMATS)
    todo = [(size, name) for size in asked.sizes or (recommended_size(source),) for name in formats]
    for size, name in todo:

        def about(model: Flux, name: str = name, size: tuple[int, int] = size) -> Row:
            found = summarize(shop.converted(source, name))
            values = {"file_bytes": found.bytes, "bits_per_weight": 8 * found.bytes / found.parameters}
            return Row(values=values, expected=bound(asked, model, size, words))

        work = Steps(lambda name=name: load_flux(shop.converted(source, name)), about, size, words, asked.warm)
        what = {"format": models.label(source, name), "size": named_size(size), "words": words}
        what |= {"threads": torch.get_num_threads()}
        close = partial(closed, work, shop if (size, name) == todo[-1] else None)
        yield Case(what, work, group=f"step {named_size(size)}", close=close)


def closed(work: Steps, shop: Workshop | None) -> None:
    work.state.drop()
    if shop is not None:
        shop.close()


def full_size(asked: Asked) -> Iterator[Case]:
    """Random weights in RAM, one format after the other; --quick: a small model."""
    blocks = (1, 2) if asked.quick else (DOUBLE, SINGLE)
    config = FluxConfig(**(SMALL if asked.quick else DEV), double_blocks=blocks[0], single_blocks=blocks[1])
    words = 16 if asked.quick else WORDS
    for size in asked.sizes or (((64, 64),) if asked.quick else SIZES[1:]):
        for name in asked.formats or RANDOM[: 1 if asked.quick else 2]:
            needs = seconds_needed(asked, config, size, words) * (asked.warm + asked.repeats)
            work = Steps(
                partial(random_in_ram, bulk(name), config),
                lambda model, size=size: Row(expected=bound(asked, model, size, words)),
                size,
                words,
                asked.warm,
                asked.repeats,
            )
            what = {"format": bulk(name), "size": named_size(size), "words": words, "blocks": sum(blocks)}
            what |= {"threads": torch.get_num_threads()}
            yield Case(what, work, needs=needs, close=work.state.drop)


def random_in_ram(name: str, config: FluxConfig) -> Flux:
    """UserError where RAM does not hold it, and the activations of a step."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in Flux(config).parameters()]
    nbytes = sum(CODECS[name if CODECS[name].fits(shape) else "f32"].nbytes(shape) for shape in shapes)
    needed, free = nbytes + 3 * 10**9, ram_now()[1]
    if needed > free:
        raise UserError(f"{free / 1e9:.1f} GB of RAM are free, {needed / 1e9:.1f} GB are needed")
    return random_flux(name, torch.device("cpu"), torch.float32, config)


def seconds_needed(asked: Asked, config: FluxConfig, size: tuple[int, int], words: int) -> float:
    """Of a pass: twice its bound, by the products of an image's and a text's tokens at 24 times the width squared."""
    rate = (asked.limits.get("cpu_tflop_per_s") or {}).get("fp32")
    blocks = config.double_blocks + config.single_blocks
    tokens = Work(size=size, words=words).tokens
    return 2 * 24 * blocks * config.hidden**2 * tokens / rate / 1e12 if rate else 0.0


# --- On CUDA ----------------------------------------------------------------------------------------------------------


@dataclass
class Formats:
    """One format at a time is in RAM behind its streamer; the next one takes its place."""

    small: bool = False
    others: int | None = None  # bytes of the card that somebody held before this process used it
    stage: Stage | None = None
    open: str | None = None
    bench: streaming.Bench | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def at(self, name: str) -> streaming.Bench:
        if self.open != name:
            self.close()
            self.stage = self.stage or self.opened()
            self.bench = streaming.Bench(name, self.stage, self.small, assume=True)
            self.stack.enter_context(self.bench.opened())
            self.bench.modulation("4GB")
            self.open = name
        return self.bench

    def opened(self) -> Stage:
        stage = open_stage()
        return stage if self.others is None else replace(stage, others=self.others)

    def close(self) -> None:
        self.stack.close()
        self.bench = self.open = None


def on_cuda(asked: Asked) -> Iterator[Case]:
    """Every size without a limit first: that step is the compute that others are held against."""
    names = [str(asked.model)] if asked.model else [bulk(name) for name in asked.formats or RANDOM]
    small = asked.quick and asked.model is None
    sizes = list(asked.sizes or (((64, 64),) if small else SIZES))
    budgets = [named_budget(nbytes) for nbytes in asked.vram] or [f"{gb}GB" for gb in BUDGETS]
    formats = Formats(small, asked.limits.get(OTHERS))
    todo = [(name, size, vram) for name in dict.fromkeys(names) for size in sizes for vram in (None, *budgets)]
    for name, size, vram in todo:
        what = {"format": models.label(Path(name), SOURCE) if asked.model else name, "size": named_size(size)}
        what |= {"vram": None if vram is None else round(float(vram.removesuffix("GB")) * 1e9), "words": WORDS}
        work = partial(streamed, formats, name, size, vram)
        yield Case(what, work, close=formats.close if (name, size, vram) == todo[-1] else nothing)


def streamed(formats: Formats, name: str, size: tuple[int, int], vram: str | None) -> Row:
    if size[0] != size[1]:
        raise UserError(f"{named_size(size)}: steps on CUDA are measured on squares")
    bench = formats.at(name)
    with watched(bench.stage.place) as peaks:
        found = bench.step(streaming.Case(size[0], vram))
    row = row_of(found, bench.stage.machine.total)
    row.memory |= {name: nbytes for name, nbytes in peaks.memory.items() if name not in ("allocated", "reserved")}
    row.memory["host_pinned"] = bench.streamer.metrics().pinned_bytes
    return row


def row_of(found: dict, total: int) -> Row:
    """From a row of `streaming`. total: bytes of the card's memory."""
    warm, plan = found["warm"], found["plan"]
    seconds, by = max((found["compute"], "compute"), (found["copies"], "copies"))
    names = {"reserved": "peak_torch", "allocated": "peak_allocated", "process": "peak"}
    assumed = found.get("compute_predicted", False)
    row = Row(
        samples={"seconds": found["samples"][warm:], "first_seconds": found["samples"][:warm]},
        values={
            "bytes_moved": plan["streamed_bytes"],
            "device_bytes": plan["device_bytes"],
            "stall_seconds": found["stall"],
            "link_gb_per_s": found["link_gb_per_s"],
            "times_bound": found["ratio"],
            "budget_bytes": found["budget"],
        },
        memory={ours: found[theirs] for ours, theirs in names.items() if theirs in found},
        expected={"predicted_seconds": found["predicted"]["seconds"], "bound_seconds": seconds, "bound_by": by},
        note="the bound's compute is predicted: without a limit it was not measured" if assumed else "",
    )
    if found["budget"] < WHOLE * total:
        row.status = EMULATED
        row.values["fits"] = found.get("peak", 0) <= found["budget"]
    return row


SUITE = Suite("step", "one step of the transformer, by format and budget", cases, weights)
