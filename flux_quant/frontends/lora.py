"""LoRAs on a transformer inside a diffusers pipeline, beside its packed weights.

    transformer.load_lora("style.safetensors", 0.8)        any family of files, no PEFT needed
    transformer.set_lora("style", 0.5)
    transformer.unload_lora()

The other methods are those that pipelines call: `pipe.load_lora_weights`, `set_adapters`, `delete_adapters`,
`enable_lora`, `disable_lora`, `unload_lora_weights` (diffusers lets nobody call them without PEFT). What they cannot do
right is a UserError that names the call that can.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from flux_quant.converters.lora_io import PEFT_METADATA, Source, lora_of, read_lora
from flux_quant.converters.lora_names import TRANSFORMER
from flux_quant.converters.lora_records import Lora
from flux_quant.errors import UserError
from flux_quant.lora import applied_to, apply_, remove_, shapes_in

FROM_FILE = "call transformer.load_lora(FILE, STRENGTH) instead of pipe.load_lora_weights"


class LoraMethods:
    """Of a module with `engine`, `dtype`, and `changing()` around a change of the engine's layers."""

    def __init__(self) -> None:
        self.loras: dict[str, tuple[Lora, float]] = {}  # by name, in the order in which they came
        self.loras_enabled = True

    # --- Ours ---------------------------------------------------------------------------------------------------------

    def load_lora(self, path: str | Path, strength: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA file of any family for FLUX.1 -> the name it goes by, that of the file if not given.

        UserError with file and key if it cannot be right; then nothing has changed.
        """
        return self.add_lora(name or Path(path).stem, read_lora(path, self.base_shapes()), strength)

    def set_lora(self, name: str, strength: float) -> None:
        """Another strength; 0 leaves the LoRA out."""
        self.put_on({**self.loras, name: (self.known(name), number(name, strength))})

    def unload_lora(self) -> None:
        """The transformer as it was before any LoRA."""
        self.put_on({})

    # --- Called by pipelines ------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, Lora]:
        """Names of what is loaded, as pipelines look for them."""
        return {name: lora for name, (lora, _) in self.loras.items()}

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Mapping[str, Tensor],
        network_alphas: Mapping[str, Any] | None = None,
        adapter_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        hotswap: bool = False,
        **_: object,
    ) -> None:
        """What `pipe.load_lora_weights` calls, with the tensors in diffusers' names."""
        given = pretrained_model_name_or_path_or_dict
        if not isinstance(given, Mapping):
            raise UserError(f"load_lora_adapter takes tensors by name; for a file {FROM_FILE}")
        if hotswap:
            raise UserError("hotswap=True is for compiled PEFT layers; unload_lora_weights, then load the other LoRA")
        tensors = {name: tensor for name, tensor in {**given, **(network_alphas or {})}.items() if own(name)}
        name = adapter_name or f"default_{len(self.loras)}"
        source = Source(Path(name), list(tensors), {PEFT_METADATA: json.dumps(plain(metadata))}, tensors.__getitem__)
        lora = lora_of(source, self.base_shapes())
        if lora.widths:
            raise UserError(f"{name} is a control LoRA, of which diffusers passes on a part only; {FROM_FILE}")
        if lora.unused:
            raise UserError(f"{name}: {lora.unused[0]} has no place in FLUX.1; {FROM_FILE}")
        self.add_lora(name, lora, 1.0)

    def set_adapters(
        self, adapter_names: str | Sequence[str], weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Strengths of these; the others are left out, as diffusers has it."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, Sequence) else [weights] * len(names)
        for name in names:
            self.known(name)
        strengths = dict.fromkeys(self.loras, 0.0)
        strengths |= {name: 1.0 if w is None else number(name, w) for name, w in zip(names, given, strict=True)}
        self.put_on({name: (lora, strengths[name]) for name, (lora, _) in self.loras.items()})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            self.known(name)
        self.put_on({name: row for name, row in self.loras.items() if name not in names})

    def enable_lora(self) -> None:
        self.loras_enabled = True
        self.put_on(self.loras)

    def disable_lora(self) -> None:
        self.loras_enabled = False
        self.put_on(self.loras)

    def fuse_lora(self, *_: object, **__: object) -> None:
        raise UserError(
            "a LoRA fused into packed weights would be rounded away; it runs beside them, its strength is set by "
            "pipe.set_adapters. To fuse it before quantizing: flux-quant convert MODEL --lora FILE"
        )

    unfuse_lora = fuse_lora

    # --- How ----------------------------------------------------------------------------------------------------------

    def known(self, name: str) -> Lora:
        if name not in self.loras:
            raise UserError(f"there is no LoRA {name} here; loaded: {', '.join(self.loras) or 'none'}")
        return self.loras[name][0]

    def base_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(shapes_in(self.engine))

    def add_lora(self, name: str, lora: Lora, strength: float) -> str:
        if name in self.loras:
            raise UserError(f"there is a LoRA {name} already; give the other one a name, or delete_adapters({name!r})")
        self.put_on({**self.loras, name: (lora, number(name, strength))})
        return name

    def put_on(self, loras: Mapping[str, tuple[Lora, float]]) -> None:
        """These and no others. All of it or nothing."""
        active = [row for row in loras.values() if row[1]] if self.loras_enabled else []
        with self.changing():
            if active:
                apply_(self.engine, active, TRANSFORMER, self.dtype)
            else:
                remove_(self.engine)
        self.loras = dict(loras)

    @contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """All strengths times `scale`, for one call: `joint_attention_kwargs={"scale": ...}`."""
        applied = applied_to(self.engine)
        if scale == 1 or applied is None:
            yield
            return
        if applied.exchanges or applied.weights:
            raise UserError("one of the LoRAs replaces weights: it takes no scale in joint_attention_kwargs")
        held, applied.dial.values = applied.dial.values, [value * scale for value in applied.dial.values]
        try:
            yield
        finally:
            applied.dial.values = held


def own(name: str) -> bool:
    """Of the transformer; `text_encoder.` keys are passed to the encoder by the pipeline."""
    return not name.startswith(("text_encoder.", "text_encoder_2."))


def number(name: str, strength: object) -> float:
    if isinstance(strength, Real):
        return float(strength)
    raise UserError(f"LoRA {name}: strength {strength!r} is not one number, which it has to be in a pipeline")


def plain(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """PEFT's settings as JSON holds them."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in (metadata or {}).items()}
