"""What ComfyUI's own nodes take and give, of those in our workflows: a test compares this with a checkout.

Inputs in their order; those in capitals of LINKED are wires, the others are widgets. CHOICE: one of a list.
"""

LINKED = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "MASK", "CONTROL_NET"}
CHOICE = "COMBO"

Signature = tuple[dict[str, str], tuple[str, ...]]  # inputs, outputs

CORE: dict[str, Signature] = {
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "ControlNetInpaintingAliMamaApply": (
        {
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "control_net": "CONTROL_NET",
            "vae": "VAE",
            "image": "IMAGE",
            "mask": "MASK",
            "strength": "FLOAT",
            "start_percent": "FLOAT",
            "end_percent": "FLOAT",
        },
        ("CONDITIONING", "CONDITIONING"),
    ),
    "ControlNetLoader": ({"control_net_name": CHOICE}, ("CONTROL_NET",)),
    "EmptySD3LatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "FLOAT"}, ("CONDITIONING",)),
    "FluxKontextImageScale": ({"image": "IMAGE"}, ("IMAGE",)),
    "KSampler": (
        {
            "model": "MODEL",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": CHOICE,
            "scheduler": CHOICE,
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": "FLOAT",
        },
        ("LATENT",),
    ),
    "LoadImage": ({"image": CHOICE}, ("IMAGE", "MASK")),
    "ModelSamplingFlux": (
        {"model": "MODEL", "max_shift": "FLOAT", "base_shift": "FLOAT", "width": "INT", "height": "INT"},
        ("MODEL",),
    ),
    "ReferenceLatent": ({"conditioning": "CONDITIONING", "latent": "LATENT"}, ("CONDITIONING",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, ("LATENT",)),
    "VAELoader": ({"vae_name": CHOICE}, ("VAE",)),
}
AFTER = {("KSampler", "seed"): "fixed", ("LoadImage", "image"): "image"}  # widgets that the frontend adds behind one


def signature_of(node: type) -> Signature:
    """Of a node class as ComfyUI has them; lists of choices become CHOICE."""
    asked = node.INPUT_TYPES()
    rows = {**asked.get("required", {}), **asked.get("optional", {})}
    inputs = {name: CHOICE if isinstance(row[0], list) else row[0] for name, row in rows.items()}
    return inputs, tuple(node.RETURN_TYPES)
