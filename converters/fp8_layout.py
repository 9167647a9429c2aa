"""How an FP8 weight lies in a safetensors file: names, markers, and what is written (`fp8_reading` reads).

Written per layer, as ComfyUI does: `X.weight`, `X.weight_scale` with weight = data * scale, and two markers: the tensor
`X.comfy_quant` survives tools that drop the header, the header's entry is what ComfyUI reads.
Source: Comfy-Org/ComfyUI comfy/ops.py and `convert_old_quants` in comfy/utils.py.
"""

import json
from collections.abc import Iterable

METADATA_KEY = "_quantization_metadata"
FORMAT = {"format": "float8_e4m3fn"}
MARKER = "comfy_quant"
MARKER_CONTENT = json.dumps(FORMAT).encode().ljust(32)  # JSON may end in blanks: 32 keeps what follows aligned
LEGACY_MARKER = "scaled_fp8"
SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")  # for activations: of no meaning to a weight


def header_metadata(weights: Iterable[str]) -> dict[str, str]:
    """The header's entry for these FP8 weights; none if there are none."""
    layers = {name.removesuffix(".weight"): FORMAT for name in weights}
    return {METADATA_KEY: json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
