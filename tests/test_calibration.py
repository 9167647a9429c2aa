"""Statistics of the layers' inputs, and what conversions make of them."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flux_quant.calibration import InputStatistics, calibrate, read_prompts, watched
from flux_quant.cli import main
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.imatrix import read_imatrix, read_maxima, write_imatrix
from flux_quant.errors import UserError
from flux_quant.generation import Request, denoise_batch, encode
from flux_quant.loading import load_flux

PARTS = find_components(BUNDLED)


def test_sums_over_calls_of_any_shape():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    seen = InputStatistics()
    inputs = [torch.randn(7, 3), torch.randn(2, 4, 3), torch.randn(3)]
    with watched(model, seen):
        for x in inputs:
            model(x)
    model(torch.full((3,), 1e6))
    rows = torch.cat([x.reshape(-1, 3) for x in inputs])
    torch.testing.assert_close(seen.mean_squares()["0.weight"], rows.square().mean(0))
    assert seen.maxima["0.weight"] == rows.abs().max() and seen.rows["2.weight"] == len(rows) == 16
    hidden = torch.tanh(model[0](rows))
    torch.testing.assert_close(seen.mean_squares()["2.weight"], hidden.square().mean(0))


def test_the_whole_way(tmp_path, capsys):
    """Every linear of the bundled model is seen, and both uses of the file work from the command line."""
    (tmp_path / "prompts.txt").write_text("large penguin on a white background\n\nsmall red apple\n")
    stats = tmp_path / "stats.safetensors"
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--threads", "1"]
    assert main(["calibrate", "-m", str(BUNDLED), "-o", str(stats), *options]) == 0
    assert "over 2 pictures of 2 steps" in capsys.readouterr().out
    importance, maxima = read_imatrix(stats), read_maxima(stats)
    with open_checkpoint(PARTS.transformer) as reader:
        linears = {name: info.shape for name, info in reader.tensors.items() if len(info.shape) == 2}
    assert set(importance) == set(maxima) == set(linears)
    assert all(len(importance[name]) == shape[1] for name, shape in linears.items())
    assert all(maxima[name] ** 2 >= importance[name].max() * (1 - 1e-5) for name in linears)
    source = str(PARTS.transformer)
    assert main(["convert", source, "-o", str(tmp_path / "a.gguf"), "-f", "q4_0", "--imatrix", str(stats)]) == 0
    assert main(["convert", source, "-o", str(tmp_path / "b.gguf"), "-f", "q4_0"]) == 0
    fp8 = str(tmp_path / "c.safetensors")
    assert main(["convert", source, "-o", fp8, "-f", "fp8", "--calibration", str(stats)]) == 0
    stored = load_file(fp8)
    scales = [name for name in stored if name.endswith(".input_scale")]
    assert len(scales) == sum(name.endswith(".weight_scale") for name in stored) > 20
    for name in scales:
        weight = name.removesuffix("input_scale") + "weight"
        torch.testing.assert_close(stored[name].item(), maxima[weight] / 448, rtol=1e-6, atol=0)
    assert main(["convert", source, "-o", fp8, "-f", "fp8", "--force", "--calibration", source]) == 2
    assert "no file of `flux-quant calibrate`" in capsys.readouterr().err


@torch.no_grad()
def test_importance_lowers_the_error_of_outputs(tmp_path):
    """Of the layers, on other pictures than those that were watched: what the matrix is for."""
    requests = [
        Request(f"large {name} on a blue background", steps=4, size=(96, 96)) for name in ("ant", "bus", "ghost")
    ]
    seen = calibrate(PARTS, requests)
    write_imatrix(tmp_path / "stats.safetensors", seen.mean_squares(), seen.metadata())
    other = Request("small octopus on the left on a red background", steps=4, size=(96, 96), seed=5)
    model = load_flux(PARTS.transformer)
    features = encode(PARTS, [other], guided=True)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if "_blocks" in name and hasattr(module, "fmt"):
            module.register_forward_pre_hook(lambda _, x, n=name: inputs.setdefault(f"{n}.weight", []).append(x[0]))
    denoise_batch(model, features, [other])
    errors = {}
    for label, options in {"plain": [], "weighted": ["--imatrix", str(tmp_path / "stats.safetensors")]}.items():
        target = tmp_path / f"{label}.gguf"
        assert main(["convert", str(PARTS.transformer), "-o", str(target), "-f", "q4_k_s", *options]) == 0
        with open_checkpoint(target) as packed, open_checkpoint(PARTS.transformer) as original:
            for name, calls in inputs.items():
                x = torch.cat([call.flatten(0, -2) for call in calls])
                wanted, difference = load(original, name), load(packed, name) - load(original, name)
                error = (x @ difference.T).norm() / (x @ wanted.T).norm()
                errors.setdefault(label, []).append(error.log())
    ratio = (torch.stack(errors["weighted"]) - torch.stack(errors["plain"])).mean().exp()
    assert ratio < 0.99, f"the error of outputs is {ratio:.3f} of that without importance"


def test_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    for name, message in (("empty.txt", "holds no prompt"), ("binary.txt", "no text file")):
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)
