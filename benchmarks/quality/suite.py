"""`flux-quant bench quality`: what each format changes, measured against the same model in BF16.

Reference: the file as it is, activations in float32. Next to every figure stands the floor, the worst that the same
model reaches when its sums are merely made in another order (another attention backend, another number of threads):
a figure at its floor says that nothing can be told apart. The parts of `what`:

    part "format"   a format of the file, in the way (compute, activations) that its products are made
    part "floor"    the reference's model again, `variant` says what is different
    part "block"    sensitivity: one block in the format, all others as they are; fewer prompts and states

Values. An interval is the 95 % bootstrap interval over prompts; every prompt's own number is in `samples`.

    weight_snr_db, weight_snr_db_worst   weights against those of the source: all that changed together, and the worst
                                         tensor (weight_worst_tensor). Error of weights, never a quality of pictures
    bits_per_weight, file_bytes          of the whole file
    velocity_error, _low, _high, _worst  relative error ||v' - v|| / ||v|| of the model's answer at states of the
                                         reference's way (teacher-forced), mean over states and prompts
    velocity_error_step_N, _low, _high   the same at the beginning of step N
    cosine_last, _low, _high, _worst     cosine between both latents at the end of each model's own way from the same
                                         noise; samples `cosine_by_step` has the mean after every step
    psnr_db, ssim, lpips, the same ends  pictures against the reference's from the same noise: how alike, not how good
    accuracy, _low, _high                share of pictures that show the emoji asked for (the bundled model's judge);
                                         accuracy_reference is that of the reference
    NAME_floor                           the worst of the floor rows
    parameters                           of the block

Image figures are of trained weights alone: for random ones weight SNR and velocity error are what means anything.
"""

from collections.abc import Callable, Iterable, Sequence

from flux_quant.benchmarks.bench.record import Row, Scalar
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite, nothing
from flux_quant.benchmarks.quality.study import FLOORS, Study, Way
from flux_quant.benchmarks.quality.subject import Subject
from flux_quant.converters.mixes import ALIASES, BASES
from flux_quant.errors import UserError

FORMATS = (
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "iq4_xs",
    "q4_0",
    "q3_k_m",
    "q2_k",
    "fp8",
)
OTHER_WAYS = (  # beside a format in its usual way, where that format is asked for
    Way("bf16", activations="bfloat16"),
    Way("q8_0", compute="int8"),
    Way("q4_k_s", compute="int8"),
    Way("fp8", compute="fp8"),
)
QUICK = ("q8_0", "q4_0")
SCANNED = "q4_k_s"  # block by block, unless formats are asked for
SECONDS = 10.0  # of a row of the bundled model on two cores


def check_formats(names: Sequence[str]) -> None:
    """UserError for a name that is no format of a transformer."""
    known = (*BASES, *ALIASES, "fp8")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"format {unknown[0]} is unknown; choose among {', '.join(known)}")


def ways(asked: Asked) -> list[Way]:
    """In an order in which each format is converted to once."""
    names = asked.formats or (QUICK if asked.quick else FORMATS)
    check_formats(names)
    return [way for name in names for way in (Way(name), *(other for other in OTHER_WAYS if other.format == name))]


def scanned(asked: Asked, subject: Subject) -> list[tuple[str, str]]:
    """(format, block). Random blocks are all alike: nothing is to be learned from them."""
    if subject.kind == "random":
        return []
    names = [name for name in asked.formats or (QUICK[-1] if asked.quick else SCANNED,) if name != "bf16"]
    return [(name, block) for name in names for block in subject.blocks]


def cases(asked: Asked) -> Iterable[Case]:
    """UserError for a format or a file that cannot be judged."""
    chosen = ways(asked)
    subject = Subject(asked)
    study, setting = Study(subject), subject.setting
    common: dict[str, Scalar] = {
        "model": subject.name,
        "prompts": setting.prompts,
        "steps": setting.steps,
        "size": "x".join(map(str, setting.size)),
    }
    few = min(setting.few[0], setting.prompts)
    made: list[tuple[dict[str, Scalar], Callable[[], Row]]] = []
    for name in FLOORS:
        made.append(({"part": "floor", "variant": name, **common}, lambda name=name: study.floor_row(name)))
    for way in chosen:
        what = {"part": "format", "format": way.format, "compute": way.compute, "activations": way.activations}
        made.append((what | common, lambda way=way: study.format_row(way)))
    for name, block in scanned(asked, subject):
        what = {"part": "block", "format": name, "block": block, **common, "prompts": few}
        made.append((what, lambda name=name, block=block: study.block_row(name, block)))
    seconds = SECONDS if subject.kind == "shipped" else 60.0
    for i, (what, work) in enumerate(made):
        close = study.close if i == len(made) - 1 else nothing
        yield Case(what, work, needs=seconds, tags=frozenset({str(what["part"])}), close=close)


SUITE = Suite("quality", "what each format changes: weights, velocities, pictures, block by block", cases)
