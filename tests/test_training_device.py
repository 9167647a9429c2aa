"""Improving the bundled model on a pretended CUDA device: everything lies there, and a recorded step waits for nothing.

Autograd's engine asks CUDA for a context that is not there, so gradients are made up; all else is what a card would do:
what is drawn, looked up and computed in the step, its optimizers, recording and replay.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from figure_world import figure_world
from pretended_cuda import pretended_cuda
from torch import Tensor

from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import NET
from flux_quant.benchmarks.tiny_flux.improving import steps, workshop
from flux_quant.benchmarks.tiny_flux.improving.decoder import DecoderTask
from flux_quant.benchmarks.tiny_flux.improving.inpainting import InpaintingTask, Masked, float_net
from flux_quant.benchmarks.tiny_flux.improving.model import ModelTask
from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline, Learned, Stepper, Task
from flux_quant.benchmarks.tiny_flux.improving.turbo import TurboTask, shipped_student
from flux_quant.benchmarks.tiny_flux.improving.workshop import SMALL, Workshop
from flux_quant.benchmarks.tiny_flux.turbo import Trajectories

pytestmark = pytest.mark.slow
SIZES = replace(SMALL, emoji=3, pool=8, masked=4, inpainting_batch=4, batch=4, captions=2, decoder_batch=2)


def made_up_gradients(loss: Tensor) -> None:
    """Of every parameter that the loss depends on."""
    assert loss.is_cuda and loss.ndim == 0
    seen, waiting, found = set(), [loss.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.full_like(node.variable, 1e-3)
            found += 1
    assert found


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    monkeypatch.setenv("FLUX_QUANT_DISABLE_TRITON", "1")
    monkeypatch.setattr(torch.Tensor, "backward", made_up_gradients)
    monkeypatch.setattr(workshop, "EmojiWorld", lambda font: figure_world(SIZES.emoji))
    monkeypatch.setattr(steps, "WARM_UP", 1)
    with pretended_cuda():
        found = workshop.open_workshop(None, tmp_path, torch.device("cuda", 0), SIZES, 1)
        workshop.encode_latents(found, Deadline(1000))
        assert found.catalogue.latents.is_cuda
        yield found


def model_task(shop: Workshop) -> tuple[Task, Learned]:
    task = ModelTask(shop)
    return task, task.learned()


def decoder_task(shop: Workshop) -> tuple[Task, Learned]:
    task = DecoderTask(shop)
    return task, Learned(list(task.decoder.parameters()), averages=list(task.average.parameters()))


def turbo_task(shop: Workshop, part: str = "single steps") -> tuple[Task, Learned]:
    student = shipped_student(shop.bundle.flux)
    for tensor in student.parameters:
        tensor.requires_grad_()
    sizes = ((24, 128), (128,), (), (9, 36, 64))
    data = Trajectories(*(torch.rand(4, *size, device=shop.device) for size in sizes))
    return TurboTask(shop, student, data, part), Learned(student.parameters, weight_decay=0.0)


def inpainting_task(shop: Workshop) -> tuple[Task, Learned]:
    task = InpaintingTask(shop, float_net(NET).to(shop.device), Masked(shop, Deadline(1000)))
    return task, task.learned()


@pytest.mark.parametrize("made", [decoder_task, model_task, turbo_task, inpainting_task])
def test_a_step_is_recorded_and_replayed(made, shop: Workshop):
    task, learned = made(shop)
    stepper = Stepper(task, learned, shop.device)
    assert stepper.prepare(1000, 1e-3, ("recorded",)) == "recorded"
    before = [p.detach().cpu().clone() for p in learned.parameters[:20]]
    loss = stepper(1e-3)
    assert loss.is_cuda and 0 < loss.item() < 20
    assert any((p.detach().cpu() != old).any() for p, old in zip(learned.parameters[:20], before, strict=True))
