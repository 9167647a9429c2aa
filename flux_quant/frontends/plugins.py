"""`quantization_config` of diffusers and transformers, and what saves and loads packed models of theirs.

    config = FluxQuantConfig("q8_0")
    model = FluxTransformer2DModel.from_pretrained(folder, quantization_config=config)     packed as it is read
    model.save_pretrained(other)                    config.json and safetensors, weights packed
    flux_quant.register()                           once, before such a folder is read again:
    model = FluxTransformer2DModel.from_pretrained(other)

Neither library has a door that opens by itself: their tables of quantizers get our row when a FluxQuantConfig is made,
or by `register`. A folder that was saved holds safetensors of our own layout: GGUF blocks have no place in any that the
libraries read. Its config.json says which layer has which format.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flux_quant.embedding import QuantEmbedding
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.frontends.blocks import choices
from flux_quant.linear import QuantLinear, quantize_module_, searched
from flux_quant.loading import Opaque


class Method(str, Enum):
    FLUX_QUANT = "flux_quant"


@dataclass
class FluxQuantConfig:
    """Pack the linears of a model's blocks in a format, but those that match a glob of `keep`."""

    format: str = "q8_0"
    keep: tuple[str, ...] = ()
    formats: dict[str, str] = field(default_factory=dict)  # layer -> format, of a model that is packed

    def __post_init__(self) -> None:
        if unknown := [name for name in (self.format, *self.formats.values()) if name not in FORMATS]:
            raise UserError(f"format {unknown[0]} is unknown; choose one of {', '.join(FORMATS)}")
        register()

    @property
    def quant_method(self) -> Method:
        return Method.FLUX_QUANT

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **unused: object
    ) -> "FluxQuantConfig | tuple[FluxQuantConfig, dict]":
        rows = {name: value for name, value in config_dict.items() if name != "quant_method"}
        made = cls(**rows | {"keep": tuple(rows.get("keep", ()))})
        return (made, unused) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": Method.FLUX_QUANT.value, **asdict(self), "keep": list(self.keep)}

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def update(self, **unused: object) -> dict[str, object]:
        """Nothing in it is for callers of from_pretrained to change."""
        return unused


class Packer:
    """What our quantizers of both libraries have in common: `quantization_config`, `pre_quantized` are theirs."""

    is_trainable = False

    def _process_model_before_weight_loading(self, model: nn.Module, **_: object) -> nn.Module:
        if self.pre_quantized:
            prepare_(model, self.quantization_config.formats)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: object) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            hide_weights_(model)
            share_tables_(model)
        elif not packed_layers(model):
            quantize_module_(model, choices(model, config.format, config.keep).items())
            hide_weights_(model)
        config.formats = packed_layers(model)
        model.is_quantized = False  # the libraries forbid such models to be cast; ours take it
        return model


def packed_layers(model: nn.Module) -> dict[str, str]:
    """Name -> format, of linears and tables; without the wrappers of `hide_weights_`."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear | QuantEmbedding):
            name = layer.fmt.native if isinstance(layer, QuantLinear) and layer.fmt.native else layer.fmt.name
            if name not in FORMATS:
                raise UserError(f"{path} is in memory as {name}, which no file holds; load it for 16-bit compute")
            found[path.removesuffix(".inner")] = name
    return found


def prepare_(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Empty packed layers on the meta device in place of a model's own. UserError for one that it does not have."""
    for path, name in formats.items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise UserError(f"the folder's config packs {path}, which {type(model).__name__} does not have") from None
        fmt, bias = FORMATS[name], getattr(layer, "bias", None)
        shape = tuple(layer.weight.shape)
        if isinstance(layer, nn.Embedding):
            parts = tuple(torch.empty(part.shape(shape), dtype=part.dtype, device="meta") for part in fmt.parts)
            replace_table_(model, path, QuantEmbedding(fmt, parts, follows="shared" not in path))
        else:
            packed = QuantLinear(shape[1], shape[0], fmt, bias=bias is not None, device="meta")
            if bias is not None:
                packed.bias = nn.Parameter(bias.detach(), requires_grad=False)
            model.set_submodule(path, packed)


def replace_table_(model: nn.Module, path: str, packed: QuantEmbedding) -> None:
    """Other names of the table, which transformers ties as parameters, are out of its sight until all is loaded."""
    tied = vars(model).get("all_tied_weights_keys") or {}
    for name in [name for name, source in tied.items() if source == f"{path}.weight"]:
        del tied[name]
        model.set_submodule(name.removesuffix(".weight"), nn.Identity())
    model.set_submodule(path, packed)


def share_tables_(model: nn.Module) -> None:
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(table, QuantEmbedding):
        model.set_input_embeddings(table)


def hide_weights_(model: nn.Module) -> None:
    """T5's feed-forward layers cast what they compute to the dtype of `wo.weight`: packed, they must not see it."""
    for path, layer in list(model.named_modules()):
        if path.rpartition(".")[2] == "wo" and isinstance(layer, QuantLinear):
            model.set_submodule(path, Opaque(layer))


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict, without the wrappers of `hide_weights_`."""
    return {name.replace(".wo.inner.", ".wo."): tensor for name, tensor in state.items()}


def attach_quantizer_(model: nn.Module, format_name: str, keep: Iterable[str] = ()) -> None:
    """A model of either library, packed already, gets what its `save_pretrained` needs; any other stays as it is."""
    for quantizer, parent in ((diffusers_quantizer, "diffusers"), (transformers_quantizer, "transformers")):
        if not any(base.__module__.split(".")[0] == parent for base in type(model).__mro__):
            continue
        if not hasattr(model, "save_pretrained"):
            continue
        config = FluxQuantConfig(format_name, tuple(keep), packed_layers(model))
        model.hf_quantizer = quantizer()(config, pre_quantized=True)
        if parent == "diffusers":
            model.register_to_config(quantization_config=config)
        else:
            model.config.quantization_config = config
        return


@cache
def diffusers_quantizer() -> type:
    from diffusers.quantizers.base import DiffusersQuantizer

    class FluxQuantDiffusersQuantizer(Packer, DiffusersQuantizer):
        is_serializable = True

        def check_if_quantized_param(
            self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Any], **_: object
        ) -> bool:
            return not self.pre_quantized and param_name in self.weights(model)

        def weights(self, model: nn.Module) -> dict[str, str]:
            """Name of a weight that is to be packed -> the format. Found once, before anything is replaced."""
            if "_weights" not in vars(self):
                config = self.quantization_config
                self._weights = {f"{path}.weight": f for path, f in choices(model, config.format, config.keep).items()}
            return self._weights

        def create_quantized_param(
            self,
            model: nn.Module,
            param_value: Tensor,
            param_name: str,
            target_device: torch.device | str,
            *_: object,
            **__: object,
        ) -> None:
            """A weight is packed as soon as it is read: the model is never in memory as it was."""
            path, name = param_name.removesuffix(".weight"), self.weights(model)[param_name]
            layer = model.get_submodule(path)
            packed = QuantLinear.from_parts(FORMATS[name], searched(param_value.float(), name), layer.bias)
            for part in FORMATS[name].parts:
                setattr(packed, part.suffix, getattr(packed, part.suffix).to(target_device))
            model.set_submodule(path, packed)

        def get_state_dict_and_metadata(
            self, state_dict: dict[str, Tensor], safe_serialization: bool = False
        ) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return plain_names(state_dict), {}

    return FluxQuantDiffusersQuantizer


@cache
def transformers_quantizer() -> type:
    from transformers.quantizers.base import HfQuantizer

    class FluxQuantHfQuantizer(Packer, HfQuantizer):
        def is_serializable(self) -> bool:
            return True

        def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return plain_names(model.state_dict()), {}

    return FluxQuantHfQuantizer


def register() -> None:
    """Let from_pretrained of diffusers and transformers read folders with packed weights. Again is no harm."""
    from diffusers.quantizers import auto as of_diffusers
    from transformers.quantizers import auto as of_transformers

    for tables, quantizer in ((of_diffusers, diffusers_quantizer), (of_transformers, transformers_quantizer)):
        tables.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.FLUX_QUANT.value] = FluxQuantConfig
        tables.AUTO_QUANTIZER_MAPPING[Method.FLUX_QUANT.value] = quantizer()
