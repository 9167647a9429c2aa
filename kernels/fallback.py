"""Whether Triton may be used on a device, and what happens when a kernel of it does not run there after all.

Triton is compiled on the user's machine, for cards that nobody tried before, with the user's driver and C compiler.
So every use has a torch path beside it: `triton_for` says beforehand why Triton is out of the question; `guarded` takes
the torch path when compiling or launching fails, says so once with the kernel's name, and remembers it.
"""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")

SWITCH = "FLUX_QUANT_DISABLE_TRITON"  # set to 1: torch everywhere
FAILED: dict[tuple[str, torch.device], str] = {}  # (kernel, device) -> error: filled by `guarded`
OURS = (ValueError, TypeError)  # arguments that no card would take: never a reason to try another path
REFUSED = ("CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_INVALID_VALUE")  # a product that cuBLAS has no kernel for


def triton_for(device: torch.device, minimum: tuple[int, int] = (7, 0)) -> str | None:
    """None if Triton may be used on `device`, otherwise the reason why not; `minimum` is a compute capability."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return f"{SWITCH} is set"
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return obstacle(device, minimum)


@cache
def obstacle(device: torch.device, minimum: tuple[int, int]) -> str | None:
    if device.type != "cuda":
        return f"no Triton on {device.type}"
    if torch.version.hip is not None:
        return "Triton kernels are unverified on ROCm"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < minimum:
        names = (".".join(map(str, version)) for version in (capability, minimum))
        return "compute capability {}, Triton kernels need {}".format(*names)
    return None


def guarded(name: str, device: torch.device, run: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """run(), with `device` as the current one (Triton launches there), or otherwise() if the card cannot do it.

    A failure to compile or launch is final for (name, device). Lack of memory is none, nor are wrong arguments. `run`
    must not have changed anything when it fails: one launch, or launches into buffers of its own.
    """
    key = name, device
    if key in FAILED:
        return otherwise()
    try:
        with current(device):
            return run()
    except Exception as error:
        if not is_refusal(error):
            raise
        if "out of memory" in str(error):  # as the driver words it when a kernel is loaded into a full card
            raise torch.cuda.OutOfMemoryError(f"{name} on {device}: {error}") from error
        FAILED[key] = f"{type(error).__name__}: {error}"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    warnings.warn(f"{name} does not run on {card}, torch does its work instead ({FAILED[key]})", stacklevel=2)
    return otherwise()


def current(device: torch.device) -> AbstractContextManager:
    """`device` as the current one if it is a CUDA device: Triton launches on the current one, whatever it is given."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def failures() -> dict[tuple[str, torch.device], str]:
    """(kernel, device) -> error of everything that `guarded` replaced by its torch path."""
    return dict(FAILED)


def is_refusal(error: Exception) -> bool:
    """Whether another path is the answer: Triton or cuBLAS cannot do this here, and the card is as it was."""
    return is_tritons(error) or any(status in str(error) for status in REFUSED)


def is_tritons(error: Exception) -> bool:
    """An error class of Triton's, or any error from within it: ptxas, the C compiler, the driver raise all sorts."""
    if belongs(type(error).__module__):
        return True
    return not isinstance(error, (*OURS, torch.cuda.OutOfMemoryError)) and passes_triton(error.__traceback__)


def passes_triton(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if belongs(traceback.tb_frame.f_globals.get("__name__", "")):
            return True
        traceback = traceback.tb_next
    return False


def belongs(module: str) -> bool:
    return module == "triton" or module.startswith("triton.")
