"""Quantization and low-VRAM runtime toolkit for FLUX.1.

    flux_quant.load("flux1-dev-Q4_K_S.gguf", vram="8GB")     a transformer for any FLUX pipeline of diffusers
    flux_quant.load_text_encoder("t5-v1_1-xxl-Q8_0.gguf")    T5 or CLIP-L for them
    flux_quant.pipeline("ComfyUI/models", vram="8GB")        all of it
    flux_quant.quantize_(module, "q8_0")                     the linears of any module, packed
    flux_quant.stream_(module, vram="6GB")                   the blocks of any module, through a small GPU
    flux_quant.FluxQuantConfig("q8_0")                       a quantization_config of from_pretrained
    flux_quant.register()                                    before folders with our packed weights are read again

Importing this module loads nothing: a name's module is imported when the name is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_quant.errors import UserError as UserError
    from flux_quant.frontends.diffusers import load as load
    from flux_quant.frontends.generic import quantize_ as quantize_
    from flux_quant.frontends.generic import stream_ as stream_
    from flux_quant.frontends.pipelines import pipeline as pipeline
    from flux_quant.frontends.plugins import FluxQuantConfig as FluxQuantConfig
    from flux_quant.frontends.plugins import register as register
    from flux_quant.frontends.transformers import load_text_encoder as load_text_encoder

__version__ = "0.1.0"

PLACES = {  # public name -> module that has it
    "UserError": "flux_quant.errors",
    "load": "flux_quant.frontends.diffusers",
    "load_text_encoder": "flux_quant.frontends.transformers",
    "pipeline": "flux_quant.frontends.pipelines",
    "quantize_": "flux_quant.frontends.generic",
    "stream_": "flux_quant.frontends.generic",
    "FluxQuantConfig": "flux_quant.frontends.plugins",
    "register": "flux_quant.frontends.plugins",
}
__all__ = [
    "FluxQuantConfig",
    "UserError",
    "load",
    "load_text_encoder",
    "pipeline",
    "quantize_",
    "register",
    "stream_",
]


def __getattr__(name: str) -> object:
    if name not in PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
