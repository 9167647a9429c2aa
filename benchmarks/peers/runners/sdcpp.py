"""stable-diffusion.cpp, as `stable-diffusion-cpp-python` builds it: its pipeline on a GGUF file, and its converter.

Of its latents it shows pictures alone, so it decodes with a small autoencoder of which `sdcpp_files` knows what it
makes of latents; its time of a step is its own account.
"""

from collections.abc import Callable

import torch


def step(task: dict) -> Callable[[], dict]:
    import numpy
    import stable_diffusion_cpp

    if task["device"] != "cpu":
        raise NotImplementedError("its wheel is built for the CPU")
    model = stable_diffusion_cpp.StableDiffusion(
        diffusion_model_path=task["model"],
        clip_l_path=task["clip"],
        taesd_path=task["autoencoder"],
        vae_decode_only=True,
        n_threads=torch.get_num_threads(),
        rng_type="cpu",  # the numbers of torch's generator
        sampler_rng_type="cpu",
    )
    seconds = []

    def call() -> dict:
        (picture,) = model.generate_image(
            prompt="",
            width=task["width"],
            height=task["height"],
            cfg_scale=1.0,
            guidance=task["guidance"],
            sample_method="euler",
            sigmas="1.0,0.0",
            sample_steps=1,
            seed=task["seed"],
            progress_callback=lambda step, steps, each: seconds.append(each) if step else None,
        )
        pixels = torch.from_numpy(numpy.array(picture.convert("RGB")))
        return {"picture": pixels, "seconds": seconds[-1]}

    return call


def convert(task: dict) -> Callable[[], None]:
    from stable_diffusion_cpp import stable_diffusion_cpp
    from stable_diffusion_cpp.stable_diffusion import GGML_TYPE_MAP

    kind = GGML_TYPE_MAP[task["format"]]

    def call() -> None:
        paths = task["source"].encode(), b"", task["target"].encode()
        if not stable_diffusion_cpp.convert(*paths, kind, b"", False):
            raise RuntimeError("its converter says no more than that it failed")

    return call
