"""How far pictures are from each other. All take pictures (n, 3, height, width) in 0-1, not yet rounded to 8 bits."""

import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RADIUS, SIGMA = 5, 1.5  # of SSIM's Gaussian window, 11 x 11
K1, K2 = 0.01, 0.03  # its constants, for values of 0-1
BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's file, without which LPIPS would have to be downloaded
SMALLEST = 32  # pixels of a side that AlexNet's layers leave something of


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(n,) dB with peak 1.0; at most 120."""
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).clamp(min=1e-12).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(n,) structural similarity, 1 for equal pictures: mean over channels, and over places where the window fits.

    Wang et al., "Image quality assessment", 2004: Gaussian window, variances of the population. scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)` must give the same.
    """
    if min(a.shape[2:]) <= 2 * RADIUS:
        raise ValueError(f"SSIM needs pictures larger than {2 * RADIUS} pixels, these are {a.shape[3]} x {a.shape[2]}")
    steps = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64, device=a.device)
    window = torch.exp(-0.5 * (steps / SIGMA) ** 2)
    window /= window.sum()

    def local_mean(x: Tensor) -> Tensor:
        x = F.conv2d(x, window.view(1, 1, -1, 1))
        return F.conv2d(x, window.view(1, 1, 1, -1))

    x, y = (picture.double().flatten(0, 1)[:, None] for picture in (a, b))
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + K1**2) * (2 * covariance + K2**2)
    places = alike / ((mean_x**2 + mean_y**2 + K1**2) * (var_x + var_y + K2**2))
    return places.flatten(1).mean(dim=1).unflatten(0, a.shape[:2]).mean(dim=1).float()


def lpips_obstacle() -> str:
    """Why `lpips` cannot be computed here; empty if it can. Nothing is ever downloaded."""
    try:
        import lpips  # noqa: F401
    except ModuleNotFoundError as error:
        return f"LPIPS left out: the package {error.name} is not installed"
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch
        return f"LPIPS left out: the package lpips does not load ({str(error).splitlines()[0]})"
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    return "" if backbone.is_file() else f"LPIPS left out: the weights of its backbone are not at {backbone}"


@cache
def lpips_model() -> nn.Module:
    import lpips

    with warnings.catch_warnings():  # of torchvision, about how lpips asks it for a model
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net="alex", verbose=False).eval()


@torch.no_grad()
def lpips(a: Tensor, b: Tensor) -> Tensor:
    """(n,) LPIPS with AlexNet (Zhang et al. 2018) at the pictures' own size, not resized; 0 for equal pictures."""
    if min(a.shape[2:]) < SMALLEST:
        raise ValueError(f"LPIPS needs pictures of {SMALLEST} pixels or more, these are {a.shape[3]} x {a.shape[2]}")
    return lpips_model()(a * 2 - 1, b * 2 - 1).flatten()
