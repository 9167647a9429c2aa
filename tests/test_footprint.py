"""Memory of a plan: held to live bytes of the engine's tensors, to the streamer's layout, to torch and to the VAE."""

from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flux_quant.drawing import vae
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS as ALL_FORMATS
from flux_quant.kernels import torch_path
from flux_quant.linear import QuantLinear
from flux_quant.model import Flux
from flux_quant.planner import footprint, phases
from flux_quant.planner.footprint import Model, TextEncoder, Work, activation_bytes, t5_xxl
from flux_quant.streaming import block_bytes
from live_bytes import FORMATS, LiveBytes, as_on_a_card, config, peak_of_a_pass, tensors_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WORKS = {
    "1024": Work(),
    "512": Work((512, 512)),
    "2MP": Work((1920, 1072), batch=2, words=256),
    "small": Work((256, 272), batch=3, words=77),
    "8bit": Work(compute="int8"),
    "8bit 512": Work((512, 512), compute="int8"),
    "lora": Work(adapters=True),
    "lora 2MP": Work((1920, 1072), words=256, adapters=True),
}


@pytest.mark.parametrize("triton", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_activations(work, dtype, triton):
    """Within some per cent of the live bytes, and never below them by more than rounding."""
    if not triton and work.compute != "float":
        work = Work(work.size, work.batch, work.words)
    flux = config(double=1, single=1)
    counted = peak_of_a_pass(flux, work, DTYPES[dtype], triton)
    predicted = activation_bytes(flux, work, dtype, triton)
    assert 0.995 <= predicted / counted <= 1.10


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_as_large_as_the_streamer_lays_them_out(name):
    flux = config(double=2, single=2)
    tensors = tensors_of(flux, name)
    with torch.device("meta"):
        module = Flux(flux)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            fmt = ALL_FORMATS[tensors[f"{path}.weight"][1]]
            module.set_submodule(path, QuantLinear(layer.in_features, layer.out_features, fmt, device="meta"))
    model = Model.of(tensors)
    names = [block.name for block in model.blocks]
    assert names == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
    hoisted = [path for path, _ in module.named_parameters() if footprint.is_hoisted(path)]
    hoisted += [path for path, _ in module.named_buffers() if footprint.is_hoisted(path)]
    for path in hoisted:
        owner, _, own = path.rpartition(".")
        setattr(module.get_submodule(owner), own, None)
    sizes, rest = block_bytes(module, names)
    assert tuple(block.nbytes for block in model.blocks) == sizes and model.outside == rest


def test_totals_of_flux():
    """dev is 11,901,408,320 values, 27 % of them modulation."""
    model = Model.of(tensors_of(config(), "bf16"))
    vectors = 2 * sum(prod(shape) for shape, _ in tensors_of(config(), "bf16").values() if len(shape) < 2)  # float32
    padding = model.nbytes - vectors - 2 * 11_901_408_320
    assert 0 <= padding < 780 * footprint.ALIGNMENT
    assert len(model.blocks) == 57 and [block.is_double for block in model.blocks] == [True] * 19 + [False] * 38
    assert 0.27 < model.modulation / model.nbytes < 0.28
    assert 1.9 < model.blocks[0].nbytes / model.blocks[-1].nbytes < 2.1
    assert model.largest == model.blocks[0].nbytes


def test_not_a_transformer():
    with pytest.raises(UserError, match="img_in.weight"):
        Model.of({"encoder.block.0.layer.0.SelfAttention.q.weight": ((64, 64), "bf16")})
    with pytest.raises(UserError, match="T5"):
        TextEncoder.of(tensors_of(config(double=1, single=1), "bf16"))


@pytest.mark.parametrize("total", [2 << 30, 6 << 30, 8 << 30, 12 << 30, 24 << 30, 141 << 30])
def test_scratch_is_that_of_the_kernels(total, monkeypatch):
    pytest.importorskip("triton")
    from flux_quant.kernels import triton_path

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    assert footprint.scratch_bytes(total, triton=True) == triton_path.scratch_bytes(torch.device("cuda"))
    assert footprint.scratch_bytes(total, triton=True, packed=False) == 0


def test_scratch_of_the_codecs():
    """FLUX.1's widest weight, unpacked by torch alone in slices: an allowance that the hungriest format nearly uses."""
    peaks = {}
    for name, fmt in ALL_FORMATS.items():
        if not fmt.is_plain:
            parts = [torch.empty(part.shape((21504, 3072)), dtype=part.dtype, device="meta") for part in fmt.parts]
            with LiveBytes() as live:
                for _, weight in torch_path.pieces(fmt, parts, torch.float32):
                    del weight
            peaks[name] = live.peak
    assert 0.7 * footprint.CODEC_SCRATCH < max(peaks.values()) <= footprint.CODEC_SCRATCH


def test_t5():
    """Weights of the published encoder: 4.63 G in the blocks; activations as transformers' T5 makes them."""
    from transformers import T5Config, T5EncoderModel

    encoder = t5_xxl("f16")
    assert encoder.weights == 24 * (4 * 4096**2 + 3 * 4096 * 10240) and encoder.nbytes >= 2 * encoder.weights
    sizes = dict(d_model=512, d_kv=64, d_ff=1280, num_heads=8, num_layers=2, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        module = T5EncoderModel(T5Config(vocab_size=100, use_cache=False, **sizes)).eval()
    tensors = {name: (tuple(t.shape), "f32") for name, t in module.state_dict().items()}
    small = TextEncoder.of(tensors)
    assert len(small.blocks) == 2 and (small.hidden, small.feed_forward) == (512, 1280)
    for words, passes in ((512, 1), (77, 1), (512, 2)):
        with torch.no_grad(), LiveBytes() as live:
            module(torch.zeros(passes, words, dtype=torch.long, device="meta"))
        predicted = small.activation_bytes(Work(words=words, passes=passes))
        assert 0.95 <= predicted / live.peak <= 1.4


def test_vae_constants():
    """Weights and operations of FLUX.1's decoder; the estimate of memory is above what its tensors take."""
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    widths = (128, 256, 512, 512)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with torch.device("meta"):
        module = AutoencoderKL(
            latent_channels=16,
            block_out_channels=widths,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **blocks,
        ).eval()
        latent = torch.empty(1, 16, 64, 96)
    assert sum(p.numel() for p in module.parameters()) == phases.VAE_WEIGHTS
    with torch.no_grad(), as_on_a_card(False), FlopCounterMode(display=False) as flops, LiveBytes() as live:
        module.decode(latent)
    positions = 64 * 96
    assert 0.9 < flops.get_total_flops() / positions / phases.VAE_FLOPS <= 1.05
    assert vae.DECODE * 4 * positions > live.peak


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (dict(size=(1000, 1024)), "multiples of 16"),
        (dict(size=(0, 16)), "multiples of 16"),
        (dict(batch=0), "batch 0"),
        (dict(words=-1), "words -1"),
        (dict(compute="int4"), "float, int8, fp8"),
    ],
)
def test_impossible_work(wrong, part):
    with pytest.raises(UserError, match=part):
        Work(**wrong)
