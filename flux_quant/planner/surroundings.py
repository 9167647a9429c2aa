"""The machine that a plan is made for, where people name one, or have one, or name a budget only."""

import sys
from dataclasses import replace

import torch

from flux_quant.errors import UserError
from flux_quant.planner.doctor import diagnose, machine_of
from flux_quant.planner.gpus import DISPLAY, GPUS, Machine, find_gpu
from flux_quant.planner.memory import Budget, amount, parse_amount
from flux_quant.planner.steptime import Host

ASSUMED = "rtx-3060-12gb"  # whose rates are taken where a budget is all that is known
NO_RAM = "RAM is taken to hold everything, pinned; give --ram 16GB to see what less means"


def surroundings(gpu: str | None, vram: str | None, ram: str | None) -> tuple[Machine, Budget, Host, list[str]]:
    """The machine to plan for, the budget, RAM, and what was assumed. UserError if there is nothing to go by."""
    windows = sys.platform == "win32"
    host = Host.of(parse_amount(ram, "RAM"), windows) if ram else None
    if gpu:
        card = find_gpu(gpu)
        machine = card.machine()
        share = f", {amount(DISPLAY)} for a desktop aside" if card.display and not vram else ""
        free, whole = machine.total if vram else machine.usable, f"all of {machine.name}{share}"
        return machine, Budget.of(vram, free, whole, reserve=0), host or Host(), [] if ram else [NO_RAM]
    if torch.cuda.is_available():
        report = diagnose()
        machine = machine_of(report)
        budget = Budget.of(vram, machine.usable, "free memory of this GPU")
        return machine, budget, host or Host.of(report.ram, windows), []
    if not vram:
        raise UserError("no CUDA GPU here to plan for; name one with --gpu (rtx-3060-12gb ...) or give --vram 8GB")
    nbytes = parse_amount(vram, "budget")
    machine = replace(GPUS[ASSUMED].machine(), total=nbytes, usable=nbytes)
    note = f"times are for the rates of an {machine.name}; name another card with --gpu"
    return machine, Budget(nbytes, f"--vram {vram}"), host or Host(), [note, *([] if ram else [NO_RAM])]
