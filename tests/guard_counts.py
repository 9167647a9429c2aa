"""What the regression guard counts: none of it depends on how fast or how busy the machine is.

    python tests/guard_counts.py      # every count beside its budget

A small FLUX in Q8_0 is walked through on the CPU, streamed through a device that does everything at once and counts;
operators and storages are counted where torch dispatches them, with dense layers.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.links import Synchronous
from flux_quant.benchmarks.random_weights import DEV, random_flux, write_random
from flux_quant.drawing.sampling import Conditioning, Drawing, denoise
from flux_quant.kernels import fused
from flux_quant.model import Flux, image_ids, text_ids
from flux_quant.modulation import Call, HoistedModulation
from flux_quant.runtime import hoisted_globs
from flux_quant.streaming import BlockStreamer, StreamPlan, block_bytes, rings_for

CPU = torch.device("cpu")
SMALL = dict(DEV, hidden=256, head_dim=128, mlp=1024, context=128, pooled=64)
TOKENS, WORDS = (4, 4), 8
BLOCKS = (5, 6)
PLANS = {"2 slots": ((), 2), "3 slots": ((), 3), "2 slots, 3 blocks stay": ((1, 3, 7), 2)}  # those that stay, slots
WARM, STEPS = 2, 4  # passes until the ring turns, and that are counted
CONVERTED = FluxConfig(**dict(SMALL, hidden=1024, mlp=4096), double_blocks=2, single_blocks=16)  # 636 MiB in BF16

BUDGETS = Path(__file__).with_name("guard.json")
MEANING = {  # words of a count's name -> what is wrong when it grows, and where to look
    "copies per block": "a streamed block is one copy of one flat buffer (flux_quant/streaming/streamer.py, layout.py)",
    "bytes over weights": "more crosses the link than streamed blocks hold beside modulation (streaming, runtime)",
    "device allocations": "slots are allocated once; passes allocate nothing (flux_quant/streaming/streamer.py)",
    "operators": "a block runs more operators of torch than before (flux_quant/model.py, kernels/fused.py)",
    "launches": "a block launches more of our kernels than before (flux_quant/model.py, kernels/fused.py)",
    "storages": "a block makes more tensors than before (flux_quant/model.py, linear.py, kernels/fused.py)",
    "peak MB": "a conversion takes the work of one tensor and 256 MB of output on its way (converters/)",
}


class Counting(Synchronous):
    """Counts copies and their bytes, and what is allocated."""

    def __init__(self) -> None:
        self.copies = self.nbytes = self.allocations = 0

    def allocate(self, nbytes: int) -> Tensor:
        self.allocations += 1
        return super().allocate(nbytes)

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.copies += 1
        self.nbytes += source.nbytes
        super().copy(to, source)


class Operators(TorchDispatchMode):
    """Counts operators, and storages that come out of them new."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.storages = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {x.untyped_storage()._cdata for x in tree_leaves(out) if isinstance(x, Tensor)}
        self.calls += 1
        self.storages += len(made - known)
        return out


class Launches:
    """In place of `kernels.pointwise`: counts what would be launched."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.counts.update([name])


def small_flux(double: int, single: int, name: str = "q8_0") -> Flux:
    return random_flux(name, CPU, torch.float32, FluxConfig(**SMALL, double_blocks=double, single_blocks=single))


def step_of(model: Flux) -> Callable[[], Tensor]:
    """A step of the sampling loop, its modulation evaluated beforehand."""
    config, one = model.config, torch.ones(1)
    img, txt = torch.ones(1, TOKENS[0] * TOKENS[1], config.in_channels), torch.ones(1, WORDS, config.context)
    (rows,) = HoistedModulation(model).rows([Call(one, torch.ones(1, config.pooled), one)], CPU, torch.float32)
    ids = image_ids(*TOKENS), text_ids(WORDS)
    return lambda: model(img, txt, None, None, *ids, steering=rows)


@torch.no_grad()
def streamed(streamer: type = BlockStreamer, device: type = Counting) -> Iterator[tuple[str, float]]:
    """Copies, bytes and allocations of steps under several plans."""
    for name, (resident, slots) in PLANS.items():
        model = small_flux(*BLOCKS)
        step, hoisted = step_of(model), hoisted_globs(model)
        names = [f"{kind}_blocks.{i}" for kind, n in zip(("double", "single"), BLOCKS, strict=True) for i in range(n)]
        sizes, _ = block_bytes(model, names, exclude=hoisted)
        crossing = [i for i in range(len(names)) if i not in resident]
        rings = rings_for([sizes[i] for i in crossing], slots)
        weights = sum(own_bytes(model.get_submodule(names[i])) for i in crossing)
        link = device()
        with streamer(model, StreamPlan(names, sizes, frozenset(resident), rings), link, exclude=hoisted):
            for _ in range(WARM):
                step()
            before = link.copies, link.nbytes, link.allocations
            for _ in range(STEPS):
                step()
            copies, nbytes, allocations = (
                now - then for now, then in zip((link.copies, link.nbytes, link.allocations), before, strict=True)
            )
        yield f"copies per block and step, {name}", copies / STEPS / len(crossing)
        yield f"bytes over weights, {name}", nbytes / STEPS / weights
        yield f"device allocations of {STEPS} steps, {name}", allocations


def own_bytes(block: nn.Module) -> int:
    """Of what a block needs in a step: everything but its modulation."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return sum(value.nbytes for name, value in tensors.items() if "mod" not in name.split(".")[0])


def counted(double: int, single: int, change: Callable[[Flux], None]) -> Counter[str]:
    """Of one step: operators and storages on the CPU; on a card operators beside our launches, and these."""
    model = small_flux(double, single, "f32")  # dense: a product is one operator
    change(model)
    step = step_of(model)
    with Operators() as on_cpu:
        step()
    launches = Launches()
    kernels = mock.patch.object(fused, "pointwise", lambda: launches)
    choice = mock.patch.object(fused, "choose", lambda name, in_triton, *rest, **more: in_triton())
    with kernels, choice, Operators() as on_card:
        step()
    found = {"operators": on_cpu.calls, "storages": on_cpu.storages, "operators on a card": on_card.calls}
    return Counter({**found, "launches on a card": launches.counts.total()})


@torch.no_grad()
def operators(change: Callable[[Flux], None] = lambda model: None) -> Iterator[tuple[str, float]]:
    """Of one more double or single block, and of everything else in a step."""
    base = counted(1, 1, change)
    double, single = counted(2, 1, change) - base, counted(1, 2, change) - base
    for name in base:
        yield f"{name}, double block", double[name]
        yield f"{name}, single block", single[name]
        yield f"{name}, the rest of a step", base[name] - double[name] - single[name]
    yield "operators, sampling around a step", around()


def around() -> int:
    """Operators that the sampling loop runs for a step, those of the model aside."""
    model = small_flux(1, 1, "f32")
    noise = torch.ones(1, TOKENS[0] * TOKENS[1], model.config.in_channels)
    text = Conditioning(torch.ones(1, WORDS, model.config.context), torch.ones(1, model.config.pooled))
    modulation, calls = HoistedModulation(model), []
    for levels in ((1.0, 0.5, 0.0), (1.0, 0.8, 0.5, 0.2, 0.0)):
        drawing = Drawing(noise, text, TOKENS, levels)
        denoise(model, drawing, modulation=modulation)
        with Operators() as seen:
            denoise(model, drawing, modulation=modulation)
        calls.append(seen.calls)
    step = step_of(model)
    with Operators() as inside:
        step()
    return (calls[1] - calls[0]) // 2 - inside.calls


CONVERT = """
import sys
from pathlib import Path

import torch

from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.kernels import cpu_quantize

def largest():  # not ru_maxrss, which begins at what the parent had when it started this process
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
cpu_quantize.quantize("q8_0", torch.randn(8, 1024).bfloat16())  # compiled
before = largest()
run(make_plan(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0")))
print(largest() - before)
"""


def conversion(prelude: str = "") -> Iterator[tuple[str, float]]:
    """Most memory of a conversion, over what its process had before; `prelude` is run in it first. On Linux."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "flux.safetensors"), Path(folder, "flux.gguf")
        write_random(source, CONVERTED, "bf16")
        command = [sys.executable, "-I", "-c", prelude + CONVERT, str(source), str(target)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    yield "peak MB of a conversion of 636 to Q8_0", float(said)


COUNTS = {"streaming": streamed, "operators": operators, "conversion": conversion}


def complaints(counts: dict[str, float], budgets: dict[str, float]) -> Iterator[str]:
    for name, count in counts.items():
        if name not in budgets:
            yield f"{name}: {count:g}, without a budget in {BUDGETS.name}"
        elif count > budgets[name]:
            meaning = next(text for words, text in MEANING.items() if words in name)
            yield f"{name}: {count:g}, budget {budgets[name]:g}: {meaning}"


def main() -> None:
    budgets = json.loads(BUDGETS.read_text())["counts"]
    for name, count in ((n, c) for part in COUNTS.values() for n, c in part()):
        print(f"{name:60} {count:10.4g} {budgets.get(name, float('nan')):10.4g}")


if __name__ == "__main__":
    sys.exit(main())
