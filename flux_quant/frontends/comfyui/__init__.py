"""The node pack for ComfyUI: our files, kernels and streaming behind its MODEL and CLIP.

This folder is the custom node: linked or copied into `ComfyUI/custom_nodes`, or put there by `flux-quant
install-comfyui DIR`. ComfyUI runs this file under a name of its own; everything else is imported from the installed
flux_quant, so both have to be in the Python that runs ComfyUI.
"""

import sys
from importlib.util import find_spec

if find_spec("flux_quant") is None:
    raise ImportError(f"install flux_quant in the Python that runs ComfyUI, {sys.executable}: it is not there")
if find_spec("folder_paths") is None or find_spec("comfy") is None:
    raise ImportError(
        "flux_quant.frontends.comfyui is a node pack that only ComfyUI can import; put it there with "
        "`flux-quant install-comfyui DIR`"
    )

from flux_quant.frontends.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
