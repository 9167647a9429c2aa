"""ControlNets in a drawing: their steps, texts and time on the device, and values that are not finite."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from control_nets import (
    BASE,
    GRID,
    NETS,
    condition,
    diffusers_net,
    drawing,
    inputs,
    randomise,
    relative_error,
    residuals_of,
    saved,
)

from flux_quant.controlnet import Control, Controls, combined
from flux_quant.drawing.sampling import Conditioning, denoise, first_not_finite
from flux_quant.errors import UserError
from flux_quant.loading import load_controlnet
from flux_quant.model import Flux, Residuals, image_ids

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # within diffusers


@pytest.fixture(scope="module")
def engine() -> Flux:
    return randomise(Flux(BASE), seed=1)


@pytest.fixture
def net(tmp_path: Path):
    return load_controlnet(saved(diffusers_net(**NETS["double and single"]), tmp_path), BASE)


def test_spans_are_those_of_diffusers(net):
    for steps in (1, 3, 7, 10, 28):
        for first, last in ((0, 1), (0, 0.65), (0.2, 0.8), (0.5, 0.55)):
            keep = [1 - float(i / steps < first or (i + 1) / steps > last) for i in range(steps)]
            acting = Control(net, condition(), span=(first, last)).acting(steps)
            assert [float(i in acting) for i in range(steps)] == keep


@torch.no_grad()
def test_a_drawing_with_a_net_is_its_steps(engine: Flux, net):
    """Step by step by hand, without hoisted modulation; the net acts in the first two of three steps."""
    control = Control(net, condition(), 0.8, (0.0, 0.7))
    plan = drawing(controls=[control])
    found = denoise(engine, plan)
    x, given = plan.noise, {**inputs(), "guidance": torch.full((2,), 3.5)}
    for step in range(3):
        given |= {"img": x, "timestep": torch.full((2,), plan.levels[step])}
        residuals = residuals_of(net, given, control.condition, 0.8) if step < 2 else Residuals()
        x = x + (plan.levels[step + 1] - plan.levels[step]) * engine(**given, residuals=residuals)
    assert relative_error(found, x) < 1e-5
    assert relative_error(denoise(engine, drawing()), x) > 1e-3
    whole = denoise(engine, drawing(controls=[replace(control, span=(0.0, 1.0))]))
    assert relative_error(whole, x) > 1e-4
    never = denoise(engine, drawing(controls=[replace(control, span=(0.9, 0.95))]))
    assert torch.equal(never, denoise(engine, drawing()))


@torch.no_grad()
def test_each_pass_asks_the_net_with_its_own_text(engine: Flux, net):
    """A negative text that is the text itself leads nowhere; another one is seen by net and model."""
    control, plain = Control(net, condition()), drawing(steps=2)
    led = denoise(engine, drawing(steps=2, controls=[control]))
    same = denoise(engine, drawing(steps=2, controls=[control], negative=plain.text, cfg=3.0))
    assert relative_error(same, led) < 1e-5
    away = Conditioning(plain.text.txt.flip(1), -plain.text.pooled)
    found = denoise(engine, drawing(steps=2, controls=[control], negative=away, cfg=3.0))
    x, given = plain.noise, {**inputs(), "guidance": torch.full((2,), 3.5)}
    for step in range(2):
        velocity = []
        for text in (plain.text, away):
            given |= {"img": x, "timestep": torch.full((2,), plain.levels[step]), **text._asdict()}
            velocity.append(engine(**given, residuals=residuals_of(net, given, control.condition)))
        x = x + (plain.levels[step + 1] - plain.levels[step]) * (velocity[1] + 3 * (velocity[0] - velocity[1]))
    assert relative_error(found, x) < 1e-5


@torch.no_grad()
def test_a_net_leaves_after_its_last_step(engine: Flux, net, monkeypatch: pytest.MonkeyPatch):
    seen = []

    class Watched(Controls):
        def after(self, step: int) -> None:
            here = len(self.present)
            super().after(step)
            seen.append((here, len(self.present)))

    monkeypatch.setattr("flux_quant.drawing.sampling.Controls", Watched)
    denoise(engine, drawing(steps=4, controls=[Control(net, condition(), span=(0.25, 0.75))]))
    assert seen == [(0, 0), (1, 1), (1, 0), (0, 0)]


@torch.no_grad()
def test_what_is_not_finite_in_a_net_is_named(engine: Flux, net):
    broken = drawing(controls=[Control(net, condition() * torch.inf)])
    with pytest.raises(UserError, match="step 1 of 3 .* the first are in what ControlNets add"):
        denoise(engine, broken)


@torch.no_grad()
def test_residuals_stay_within_float16(net):
    far = torch.tensor([[[6e4, -6e4, 1.0]]], dtype=torch.float16)
    (total,) = combined([(Control(net, condition(), 2.0), [far])], 1)
    assert total.tolist() == [[[65504.0, -65504.0, 2.0]]]
    wide = (Control(net, condition()), [far])
    (total,) = combined([wide, wide], 1)
    assert total.isfinite().all()


def test_nets_and_references_exclude_each_other(net):
    from flux_quant.drawing.sampling import Reference

    with pytest.raises(ValueError, match="reference"):
        drawing(controls=[Control(net, condition())], reference=Reference(condition(), image_ids(*GRID)))


def test_the_search_finds_residuals(engine: Flux):
    x = inputs()
    bad = Residuals([torch.full((2, 15, 64), torch.nan)] * 7)
    assert first_not_finite(engine, {**x, "residuals": bad}) == "what ControlNets add"
