"""aircanvas: splits a diffusers folder into a file per block, FP8 on request, and reads each when its turn comes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch


def step(task: dict) -> Callable[[], dict]:
    from aircanvas.sharding.splitter import split_model
    from aircanvas.streaming.engine import StreamingEngine
    from diffusers import FluxTransformer2DModel

    source = Path(task["folder"])
    shards = source / "aircanvas"
    manifest = split_model(
        str(source), cache_dir=shards, compression="fp8", subfolder="transformer", compute_dtype=task["dtype"]
    )
    config = json.loads((source / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config).eval().to(getattr(torch, task["dtype"]))
    engine = StreamingEngine(model, manifest, shards, device=task["device"])
    rows, columns = task["height"] // 16, task["width"] // 16
    noise = torch.randn(1, 16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(task["seed"]))
    img = noise.view(1, 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, 64)
    places = torch.zeros(rows, columns, 3)
    places[..., 1] += torch.arange(rows)[:, None]
    places[..., 2] += torch.arange(columns)[None]
    given = dict(
        hidden_states=img,
        encoder_hidden_states=torch.zeros(1, task["words"], model.config.joint_attention_dim),
        pooled_projections=torch.zeros(1, model.config.pooled_projection_dim),
        timestep=torch.ones(1),
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(task["words"], 3),
        guidance=torch.full((1,), float(task["guidance"])),
    )
    given = {name: value.to(task["device"], getattr(torch, task["dtype"])) for name, value in given.items()}

    def call() -> dict:
        velocity = model(**given, return_dict=False)[0].float().cpu()
        return {"velocity": velocity, "bytes_read": int(engine.stats["bytes_loaded"])}

    return call
