"""Suite `tiers`: what the planner predicts for cards by their memory, and what users report of such cards today.

Of every tier a card is named; nothing here is measured on it. The format is the most precise of CANDIDATES with which a
picture takes at most SLACK longer than with the fastest; BF16 only where all of its blocks stay on the card. Beside the
prediction stands the bound: the larger of a step's operations at the datasheet's rate and of the bytes that the plan
copies at the usual rate of the card's link. Each row is what `flux-quant plan` says for the same question.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from flux_quant.benchmarks.bench.published import REPORTS, Report
from flux_quant.benchmarks.bench.record import PREDICTED, REPORTED, Row, Scalar
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite
from flux_quant.benchmarks.bench.sweep import named_size
from flux_quant.benchmarks.make_full_size import infos
from flux_quant.converters.recipe import build
from flux_quant.errors import UserError
from flux_quant.planner import plan as planner
from flux_quant.planner.footprint import Model, Work, t5_xxl
from flux_quant.planner.gpus import CPU_FLOPS, GPUS, Gpu
from flux_quant.planner.plan import Plan
from flux_quant.planner.surroundings import surroundings

TIERS = {  # GB -> a card that people have
    4: "gtx-1050-ti-4gb",
    6: "rtx-2060-6gb",
    8: "rtx-4060-8gb",
    10: "rtx-3080-10gb",
    12: "rtx-3060-12gb",
    16: "rtx-4060-ti-16gb",
    24: "rtx-3090-24gb",
}
CPU_ONLY = "CPU only"
CANDIDATES = ("bf16", "q8_0", "q6_k", "q5_k_s", "q4_k_s")  # the most precise first
WHOLE = ("bf16",)  # taken only where nothing streams
SLACK = 0.05
T5 = "q8_0"  # where no file says otherwise, as `plan`
WORDS = {"dev": 512, "schnell": 256}


@dataclass(frozen=True)
class Setting:
    model: str
    size: tuple[int, int]
    steps: int

    @property
    def work(self) -> Work:
        return Work(size=self.size, words=WORDS[self.model], steps=self.steps)

    def __str__(self) -> str:
        return f"{named_size(self.size)}, {self.model}, {self.steps} steps"


SETTINGS = (
    Setting("schnell", (512, 512), 4),
    Setting("schnell", (1024, 1024), 4),
    Setting("dev", (1024, 1024), 20),
    Setting("dev", (1920, 1072), 20),
)


@cache
def full_size(model: str, recipe: str) -> Model:
    """FLUX.1's shapes in the formats that a file of this recipe has."""
    tensors = infos(1.0, guidance=model == "dev")
    suffix = ".safetensors" if recipe == "bf16" else ".gguf"
    chooser = build(recipe, "FLUX.1", suffix, [info.name for info in tensors])
    chosen = {info.name: chooser.choose(info.name, info.shape, "bf16", lambda: True)[0] for info in tensors}
    return Model.of({info.name: (info.shape, chosen[info.name]) for info in tensors})


def plan_of(card: str, setting: Setting, recipe: str) -> Plan:
    """UserError with the minimum where that does not fit."""
    machine, budget, host, _ = surroundings(card, None, None)
    return planner.plan(full_size(setting.model, recipe), setting.work, machine, budget, t5_xxl(T5), host)


def best(card: str, setting: Setting, recipes: tuple[str, ...] = CANDIDATES) -> tuple[str, Plan]:
    """The format of the tier and its plan. UserError if none fits."""
    plans, problem = {}, None
    for recipe in recipes:
        try:
            plan = plan_of(card, setting, recipe)
        except UserError as error:
            problem = error
        else:
            if recipe not in WHOLE or not plan.stream.streamed:
                plans[recipe] = plan
    if not plans:
        raise problem or UserError(f"{', '.join(recipes)} would stream")
    fastest = min(plan.seconds for plan in plans.values())
    return next((recipe, plan) for recipe, plan in plans.items() if plan.seconds <= (1 + SLACK) * fastest)


def operations(model: Model, work: Work) -> tuple[float, float]:
    """Of one pass: in linears of the blocks, in attention."""
    linears = sum(block.weights * (1 if block.is_double else 2) for block in model.blocks) * work.tokens * work.batch
    return linears, len(model.blocks) * 4 * work.batch * work.tokens**2 * model.config.hidden


def bound(plan: Plan, card: Gpu) -> tuple[float, str]:
    """Seconds of a step that no program can go below on this card with these residents, and what by."""
    flops = card.tflops()[plan.machine.dtype] * 1e12
    compute = sum(operations(plan.model, plan.work)) * plan.work.passes / flops
    copies = plan.stream.streamed_bytes * plan.work.passes / card.link
    return max((compute, "compute"), (copies, "copies"))


def predicted(card: str, setting: Setting, recipe: str, plan: Plan) -> Row:
    seconds, by = bound(plan, GPUS[card])
    return Row(
        values={
            "picture_seconds": plan.seconds,
            "bytes_moved": plan.stream.streamed_bytes * plan.work.passes,
            "stall_seconds": round(max(0.0, plan.step - plan.compute), 6),
            "file_bytes": plan.model.nbytes,
            "resident_share": 1 - plan.stream.streamed_bytes / sum(plan.stream.sizes),
            "fits": True,
        },
        memory={"device": plan.peak},
        expected={"predicted_seconds": plan.step, "bound_seconds": seconds, "bound_by": by},
        status=PREDICTED,
        rerun=f"flux-quant plan flux1-{setting.model}-{recipe} --gpu {card} --size {named_size(setting.size)} "
        f"--steps {setting.steps}",
    )


def too_small(error: UserError) -> Row:
    return Row(values={"fits": False}, status=PREDICTED, note=str(error))


def on_cpu(setting: Setting, limits: dict) -> Row:
    """The bound alone: the planner has no model of the processor."""
    measured = (limits.get("cpu_tflop_per_s") or {}).get("fp32")
    rate = measured * 1e12 if measured else CPU_FLOPS
    whose = "products of float32 as measured here" if measured else "8 cores with AVX2"
    work = setting.work
    seconds = sum(operations(full_size(setting.model, "q8_0"), work)) / rate
    return Row(
        values={"picture_seconds_at_least": seconds * work.steps},
        expected={"bound_seconds": seconds, "bound_by": "compute"},
        status=PREDICTED,
        note=f"a bound: the operations of a step at {rate / 1e9:.0f} GFLOP/s ({whose}), and nothing else",
    )


def cases(asked: Asked) -> Iterator[Case]:
    """`asked.formats` instead of the best of CANDIDATES."""
    for setting in SETTINGS:
        what = {"setting": str(setting)}
        for tier, card in TIERS.items():
            place = {"tier": f"{tier} GB", "card": GPUS[card].name} | what
            for recipes in [(one,) for one in asked.formats] or [CANDIDATES]:
                yield tier_case(place, card, setting, recipes)
        place = {"tier": CPU_ONLY, "card": "any processor"} | what
        yield Case(place, lambda setting=setting: on_cpu(setting, dict(asked.limits)))
    if not asked.formats:
        yield from map(report_case, REPORTS)


def tier_case(place: dict, card: str, setting: Setting, recipes: tuple[str, ...]) -> Case:
    """What a case is called has its format in it, so that is decided at once: it takes milliseconds."""
    try:
        recipe, plan = best(card, setting, recipes)
    except UserError as error:
        return Case(place | {"format": recipes[-1]}, lambda error=error: too_small(error))
    return Case(place | {"format": recipe}, lambda: predicted(card, setting, recipe, plan))


def report_case(report: Report) -> Case:
    low, high = report.seconds
    values = {report.kind: low, **({f"{report.kind}_most": high} if high > low else {}), "source": report.source}
    what = {"tier": f"{report.vram} GB", "card": report.card, "setting": report.kind.replace("_seconds", ""),
            "size": report.size, "format": report.format}  # fmt: skip
    return Case(what, lambda: Row(values=values, status=REPORTED, note=report.note), subject=report.program)


def weights(asked: Asked) -> dict[str, Scalar]:
    return {"kind": "shapes", "name": "FLUX.1's shapes"}


SUITE = Suite("tiers", "what cards of 4 to 24 GB would do, predicted; what users report of them", cases, weights)
