"""Improving the bundled model unattended: steps, time, verdicts, what is written; every part is tried small."""

import json
import math
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from figure_world import figure_world
from torch import Tensor, nn

from flux_quant.benchmarks.tiny_flux import improve
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import NET
from flux_quant.benchmarks.tiny_flux.evaluate_turbo import TURBO
from flux_quant.benchmarks.tiny_flux.improving import workshop
from flux_quant.benchmarks.tiny_flux.improving.decoder import improve_decoder
from flux_quant.benchmarks.tiny_flux.improving.inpainting import float_net, improve_inpainting
from flux_quant.benchmarks.tiny_flux.improving.model import ModelTask, improve_model
from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline, Learned, Rates, Stepper, learn
from flux_quant.benchmarks.tiny_flux.improving.turbo import Student, improve_turbo, shipped_student
from flux_quant.benchmarks.tiny_flux.improving.verdict import Outcome, compare
from flux_quant.benchmarks.tiny_flux.improving.workshop import SMALL, Workshop, open_workshop
from flux_quant.benchmarks.tiny_flux.muon import BatchedMuon, Muon, orthogonalise, orthogonalise_all
from flux_quant.benchmarks.tiny_flux.networks import CONFIG, GRID
from flux_quant.benchmarks.tiny_flux.train import shifted_uniform
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.lora_io import read_lora
from flux_quant.generation import Request, load_loras
from flux_quant.loading import load_controlnet, load_flux
from flux_quant.lora import apply_, shapes_in
from flux_quant.model import image_ids, text_ids

COMPONENTS = find_components(BUNDLED)
CPU = torch.device("cpu")
SHAPES = ((8, 24), (24, 8), (24, 8), (5, 5), (8, 24), (3, 40))


class Ticking:
    """A clock that goes on by one second whenever it is asked."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Counted:
    """Takes no steps, remembers their rates."""

    def __init__(self, losses: list[float] | None = None) -> None:
        self.rates, self.losses = [], losses

    def prepare(self, seconds: float, rate: float) -> str:
        return "plain"

    def __call__(self, rate: float) -> Tensor:
        self.rates.append(rate)
        return torch.tensor(1.0 if self.losses is None else self.losses[len(self.rates) - 1])


def test_matrices_are_made_orthogonal_together_as_alone():
    for shape in SHAPES:
        matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        alone = torch.stack([orthogonalise(matrix) for matrix in matrices])
        torch.testing.assert_close(orthogonalise_all(matrices), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_batched_muon_is_muon(as_tensor: bool):
    generator = torch.Generator().manual_seed(1)
    first = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    one, all_of_them = Muon(first, 0.05, weight_decay=0.1), BatchedMuon(second, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip(first[:-1], second[:-1], strict=True):  # the last has no gradient, and stays
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        one.step()
        all_of_them.step(torch.tensor(0.05) if as_tensor else 0.05)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_learning_ends_in_time():
    """By the clock alone: it is asked a few times a step, and never long after the end."""
    clock, stepper, kept = Ticking(), Counted(), []
    deadline = Deadline(100, clock)
    course = learn(stepper, Rates(1.0, 5), deadline, keep=lambda: kept.append(clock.now), parts=5)
    assert clock.now <= deadline.begin + 100 + 3
    assert 30 < course.steps == len(stepper.rates) <= 100 and 4 <= len(kept) <= 5
    assert course.seconds <= 101 and len(course.losses) >= len(kept)
    assert max(stepper.rates) <= 1.0 and stepper.rates[0] < 0.5 and stepper.rates[-1] < 0.1


def test_no_time_is_no_step_unless_some_are_asked_for():
    for least in (0, 3):
        clock = Ticking()
        deadline = Deadline(-5, clock)
        assert learn(Counted(), Rates(1.0), deadline, least).steps == least
    within = Deadline(10, Ticking()).within(1000)
    assert within.seconds <= 10


def test_a_lost_loss_ends_learning():
    clock = Ticking()
    course = learn(Counted([1.0] * 8 + [math.nan] * 1000), Rates(1.0), Deadline(500, clock))
    assert not math.isfinite(course.losses[-1]) and clock.now < 200


def test_rates_rise_and_fall():
    rates = Rates(2.0, warm_up=10, constant=0.5)
    assert rates.at(0, 0) == pytest.approx(0.2) and rates.at(0.3, 50) == rates.at(0.5, 50) == 2.0
    assert rates.at(0.75, 50) == pytest.approx(2 * (1 - 0.49)) and rates.at(1.0, 50) == pytest.approx(0.04)
    assert rates.at(1.7, 50) == rates.at(1.0, 50)


RIGHT, DB = torch.ones(100, dtype=torch.bool), torch.linspace(10, 30, 100)
WORSE = RIGHT.clone()
WORSE[:20] = False
NOISE = torch.randn(100, generator=torch.Generator().manual_seed(2))
VERDICTS = {  # shipped, candidate -> the candidate is better
    "the same": ((RIGHT, DB), (RIGHT, DB), False),
    "surely nearer": ((RIGHT, DB), (RIGHT, DB + 0.5 + NOISE), True),
    "nearer, not surely": ((RIGHT, DB), (RIGHT, DB + NOISE - NOISE.mean() + 0.1), False),
    "nearer by what nobody sees": ((RIGHT, DB), (RIGHT, DB + 0.02), False),
    "more of them right": ((WORSE, DB), (RIGHT, DB), True),
    "fewer right, nearer": ((RIGHT, DB), (WORSE, DB + 3), False),
    "more right, much farther": ((WORSE, DB), (RIGHT, DB - 1), False),
    "not finite": ((WORSE, DB), (RIGHT, torch.full_like(DB, math.inf)), False),
}


@pytest.mark.parametrize(("shipped", "candidate", "better"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(shipped: tuple, candidate: tuple, better: bool):
    found = compare(Outcome(*shipped), Outcome(*candidate))
    assert found["verdict"] == ("candidate" if better else "shipped")
    json.dumps(found)
    assert found["before"]["accuracy"] == shipped[0].double().mean().item()


class Square:
    """A loss that a matrix and a vector bring to zero."""

    def __init__(self) -> None:
        self.matrix, self.vector = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(3))

    def loss(self) -> Tensor:
        return self.matrix.square().mean() + (self.vector - 2).square().mean()

    def compile_(self, on: bool) -> None:
        assert not on


def test_a_step_follows_the_gradient_and_the_average_follows_it():
    task = Square()
    averages = [p.detach().clone() for p in (task.matrix, task.vector)]
    stepper = Stepper(task, Learned([task.vector], [task.matrix], averages, ema=0.5, weight_decay=0.0), CPU)
    assert stepper.prepare(1.0, 0.1) == "plain"
    first = stepper(0.01).item()
    torch.testing.assert_close(averages[1], (torch.ones(3) + task.vector.detach()) / 2)
    assert all(stepper(0.01) < first for _ in range(5))
    before = task.vector.detach().clone()
    stepper(0.0)
    assert torch.equal(task.vector, before), "the rate is read anew at each step"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """On eight drawn figures, which the model does not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop, "EmojiWorld", lambda font: figure_world(SMALL.emoji))
        found = open_workshop(None, tmp_path_factory.mktemp("out"), CPU, SMALL, 1)
    workshop.encode_latents(found, Deadline(1000))
    return found


def inputs(batch: int = 3) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(4)
    x, txt, pooled = (torch.randn(batch, *size, generator=g) for size in ((36, 64), (24, 128), (128,)))
    return x, txt, pooled, torch.rand(batch, generator=g), image_ids(*GRID), text_ids(24), torch.full((batch,), 3.5)


def test_a_merged_lora_draws_what_its_side_paths_draw(shop: Workshop):
    model = load_flux(COMPONENTS.transformer)
    apply_(model, load_loras(Request("", loras=((TURBO, 1.0),)), model))
    student = shipped_student(shop.bundle.flux)
    assert len(student.down) == len(read_lora(TURBO, shapes_in(model)).records)
    with torch.no_grad():
        wanted, found = model(*inputs()), student.merged()(*inputs())
        plain = Student(student.flux, student.down, {n: 0 * up for n, up in student.up.items()}).merged()(*inputs())
    scale = wanted.square().mean().sqrt()
    assert (found - wanted).square().mean().sqrt() < 1e-4 * scale < (plain - wanted).square().mean().sqrt()


def test_the_net_to_be_trained_is_the_shipped_one():
    own, judge = float_net(NET), load_controlnet(NET, CONFIG)
    x, txt, pooled, t, img_ids, txt_ids, guidance = inputs()
    condition = torch.randn(3, 36, 68, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, wanted = (
            net(x, condition, txt, img_ids, txt_ids, net.steering(pooled, t, guidance, x.dtype))[0]
            for net in (own, judge)
        )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_maps_of_looks_begin_where_they_tell_something(shop: Workshop):
    """They are fitted before the first step: better than the mean picture, for captions drawn anew."""
    task = ModelTask(shop)
    rows = shop.catalogue.rows[shop.catalogue.draw(64)]
    with torch.no_grad():
        text = shop.bundle.features(*shop.captions.tokens(shop.captions.random(rows)))
        fitted = task.appearance.loss(text, rows[:, 0])
    assert fitted < 2 * task.appearance.targets[rows[:, 0]].square().mean()


def test_noise_levels_of_training_are_on_the_device():
    meta = shifted_uniform(5, device="meta")
    assert meta.device.type == "meta" and meta.shape == (5,)


@pytest.mark.slow
@pytest.mark.parametrize("part", [improve_decoder, improve_model, improve_turbo, improve_inpainting])
def test_a_part_learns_and_writes_a_candidate(part, shop: Workshop):
    shipped = {path: path.stat().st_mtime_ns for path in BUNDLED.rglob("*") if path.is_file()}
    found = part(shop, Deadline(0.5))
    assert found["verdict"] in ("shipped", "candidate")
    json.dumps(found)
    for course in [found] if "steps" in found else [found["single steps"], found["own path"]]:
        assert course["steps"] >= SMALL.least and all(map(math.isfinite, course["losses"]))
    made = {path.relative_to(shop.out / "candidate") for path in (shop.out / "candidate").rglob("*") if path.is_file()}
    assert made and made <= {path.relative_to(BUNDLED) for path in shipped}, "it has the form of what ships"
    assert {path: path.stat().st_mtime_ns for path in shipped} == shipped


def test_pieces_are_one_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(improve, "PIECE", 7000)
    (tmp_path / "candidate/vae").mkdir(parents=True)
    (tmp_path / "candidate/vae/ae.safetensors").write_bytes(bytes(range(256)) * 60)
    (tmp_path / "training.json").write_text("{}")
    for _ in range(2):
        paths = improve.write_pieces(tmp_path)
    assert [path.stat().st_size for path in paths[:-1]] == [7000] * (len(paths) - 1) and len(paths) > 2
    with tarfile.open(fileobj=BytesIO(b"".join(path.read_bytes() for path in paths))) as tar:
        assert {m.name for m in tar if m.isfile()} == {"training.json", "candidate/vae/ae.safetensors"}


def test_everything_that_comes_back_is_small_enough():
    """A model folder as it ships and the net in bfloat16: below 60 MB, pieces below 16 MiB, at most eight files."""
    whole = sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) + 2 * 5.4e6
    assert improve.PIECE < 16 << 20 and whole < 60e6 and math.ceil(whole / improve.PIECE) <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--font", "no-such.ttf"], "no-such.ttf is missing"),
        (["--out", str(BUNDLED / "vae")], "belongs to the shipped files"),
    ],
)
def test_what_cannot_begin_says_why(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(improve, "watch", lambda seconds: None)
    assert improve.main(["--small", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_try_is_left_out_without_the_font(tmp_path, monkeypatch, capsys):
    """The suite's dry run walks on."""
    monkeypatch.setattr(improve, "watch", lambda seconds: None)
    monkeypatch.setenv("FLUX_QUANT_EMOJI_FONT", str(tmp_path / "none.ttf"))
    assert improve.main(["--small", "--out", str(tmp_path)]) == 0 and "none.ttf is missing" in capsys.readouterr().err
    assert improve.main(["--out", str(tmp_path)]) == 2 and not list(tmp_path.iterdir())


def test_a_part_that_fails_takes_no_other_with_it(capsys):
    def work() -> dict[str, object]:
        raise RuntimeError("no memory")

    assert improve.attempted(work) == dict(verdict="failed", error="RuntimeError: no memory")
    with pytest.raises(SystemExit):
        improve.parsed(["--only", "everything"])
    assert improve.parsed(["--seconds", "30", "--only", "turbo"]).parts == ["turbo"]
