"""How an FP8 weight lies in a safetensors file: names, markers, and what is written (`fp8_reading` reads).

Written per layer, as ComfyUI does: `X.weight`, `X.weight_scale` with weight = data * scale, and two markers: the tensor
`X.comfy_quant` survives tools that drop the header, the header's entry is what ComfyUI reads. The legacy form, which
Forge and ComfyUI until 2025 read, has `X.scale_weight` and one tensor `scaled_fp8` for the whole model: of two elements
if products with FP8 activations are not wanted, of none if they are. Activations have a scale if it was calibrated;
without one, ComfyUI casts them at scale 1 on cards with FP8 products.
Source: Comfy-Org/ComfyUI comfy/ops.py and `convert_old_quants` in comfy/utils.py.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from flux_quant.formats import Shape

METADATA_KEY = "_quantization_metadata"
FORMAT = {"format": "float8_e4m3fn"}
MARKER = "comfy_quant"
MARKER_CONTENT = json.dumps(FORMAT).encode().ljust(32)  # JSON may end in blanks: 32 keeps what follows aligned
LEGACY_MARKER = "scaled_fp8"
SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")  # for activations: of no meaning to a weight


@dataclass(frozen=True)
class Fp8Form:
    """How scaled FP8 weights are written. `input_scales`: weight name -> activation = FP8 value * scale.

    `roots`: the prefixes of the models in an all-in-one file; each has a legacy marker of its own.
    """

    legacy: bool = False
    input_scales: Mapping[str, float] = field(default_factory=dict)
    roots: tuple[str, ...] = ("",)

    @property
    def scale(self) -> str:
        """Suffix of a weight's scale."""
        return SCALES[self.legacy]

    def constants(self, weights: Iterable[str]) -> dict[str, tuple[torch.dtype, Shape, bytes]]:
        """The further tensors that belong to these FP8 weights, with their content."""
        weights = list(weights)
        out: dict[str, tuple[torch.dtype, Shape, bytes]] = {}
        for name in weights:
            module = name.removesuffix("weight")
            if name in self.input_scales:
                value = struct.pack("<f", self.input_scales[name])
                out[module + INPUT_SCALES[self.legacy]] = torch.float32, (), value
            if not self.legacy:
                out[module + MARKER] = torch.uint8, (len(MARKER_CONTENT),), MARKER_CONTENT
        if self.legacy and weights:
            count = 0 if self.input_scales else 2
            out |= {root + LEGACY_MARKER: (torch.float8_e4m3fn, (count,), bytes(count)) for root in self.roots}
        return out

    def metadata(self, weights: Iterable[str]) -> dict[str, str]:
        return {} if self.legacy else header_metadata(weights)


PER_LAYER = Fp8Form()


def header_metadata(weights: Iterable[str]) -> dict[str, str]:
    """The header's entry for these FP8 weights; none if there are none."""
    layers = {name.removesuffix(".weight"): FORMAT for name in weights}
    return {METADATA_KEY: json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
