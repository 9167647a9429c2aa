"""The engine as `transformer=` of diffusers' FLUX pipelines.

    transformer = load("flux1-dev-Q4_K_S.gguf", vram="8GB")
    pipe = FluxPipeline.from_pretrained("FLUX.1-dev", transformer=transformer)
    image = pipe("a red fox", num_inference_steps=20).images[0]

`EngineTransformer` has the call signature and the attributes of diffusers' FluxTransformer2DModel that its pipelines
use. Moving it moves the packed weights, `.to(torch.bfloat16)` chooses the dtype of the activations and never changes
packed weights. With a budget of VRAM nothing is moved: blocks come to the GPU as a plan says, wherever the pipeline is;
`.to("cpu")`, which `enable_model_cpu_offload` calls when another model's turn comes, gives the GPU's memory back.

A pipeline asks step by step. At the first step the modulation of all that follow is evaluated too, if the scheduler is
known or the timesteps are those of the picture before, and kept for the next picture with the same prompt.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_quant.controlnet import served
from flux_quant.errors import UserError
from flux_quant.frontends.lora import LoraMethods
from flux_quant.frontends.saving import save_transformer
from flux_quant.frontends.streamed import Streamed
from flux_quant.generation import choose_device
from flux_quant.linear import COMPUTES
from flux_quant.loading import load_flux
from flux_quant.model import Flux, Residuals, StepModulation
from flux_quant.modulation import Call, HoistedModulation
from flux_quant.runtime import Memory, prepare

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

Log = Callable[[str], None]


class EngineTransformer(LoraMethods, nn.Module):
    """Stands in for FluxTransformer2DModel. Made by `load`, as a model of diffusers (`transformer_class`)."""

    def __init__(
        self,
        engine: Flux,
        scheduler: "FlowMatchEulerDiscreteScheduler | None" = None,
        memory: Memory | None = None,
        compute: str = "16-bit",
    ) -> None:
        """scheduler: the pipeline's own; it is asked which timesteps follow. memory: of the device to stream to."""
        nn.Module.__init__(self)
        LoraMethods.__init__(self)
        self.engine, self.scheduler = engine, scheduler
        self.modulation = HoistedModulation(engine)
        self.streamed = None if memory is None else Streamed(engine, memory, compute)
        self.told = torch.device("cpu")  # where it was moved to, if it streams
        self.timesteps: list[float] = []  # of this picture so far
        self.before: list[float] = []  # of the picture before
        self.register_to_config(**engine.config.diffusers())

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: that of the biases, which `.to(dtype)` casts."""
        return self.engine.final_layer.linear.bias.dtype

    @property
    def device(self) -> torch.device:
        """Where it was moved to. What streams computes on the device of its budget nevertheless."""
        return self.told if self.streamed else self.engine.final_layer.linear.bias.device

    @property
    def place(self) -> torch.device:
        """Where it computes."""
        return self.streamed.memory.place if self.streamed else self.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EngineTransformer":
        """What every move and cast goes through."""
        if self.streamed is None:
            return super()._apply(fn, recurse)
        shown = fn(torch.empty(0, dtype=self.dtype, device=self.told))
        self.told = shown.device
        if shown.dtype != self.dtype:
            self.streamed.leave()
            super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), recurse)
        if self.told.type == "cpu":
            self.streamed.pause()
        return self

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of the engine's layers: its blocks are at home, its shapes are told anew."""
        if self.streamed:
            self.streamed.leave()
        yield
        self.register_to_config(**self.engine.config.diffusers())

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """diffusers marks conditional and unconditional calls for its step caches; the engine keeps none."""
        yield

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        **unsupported: Any,
    ) -> "Transformer2DModelOutput | tuple[Tensor]":
        """As FluxTransformer2DModel.forward: timestep (B,) in 0-1, ids (S, 3) and (T, 3). The result is where
        hidden_states are. ValueError for what the engine does not do, such as an IP adapter, rather than a picture
        without it."""
        more = dict(joint_attention_kwargs or {})
        scale = more.pop("scale", 1.0)
        if given := [name for name, value in (unsupported | more).items() if value is not None and value is not False]:
            raise ValueError(f"the flux_quant engine does not support {', '.join(given)}")
        self.check_hooks()
        dtype, place = self.dtype, self.place
        image, words, pooled = (
            tensor.to(place, dtype) for tensor in (hidden_states, encoder_hidden_states, pooled_projections)
        )
        ids = [(one[0] if one.ndim == 3 else one).to(place) for one in (img_ids, txt_ids)]
        guidance = None if guidance is None else guidance.to(place)
        blocks = self.engine.config
        nets = [
            [x.to(place, dtype) for x in samples or ()]
            for samples in (controlnet_block_samples, controlnet_single_block_samples)
        ]
        residuals = Residuals(
            served(nets[0], blocks.double_blocks, controlnet_blocks_repeat), served(nets[1], blocks.single_blocks)
        )

        def run() -> Tensor:
            rows = None if torch.is_grad_enabled() else self.rows(timestep.to(place), pooled, guidance)
            return self.engine(image, words, pooled, timestep.to(place).float(), *ids, guidance, rows, residuals)

        with self.scaled(scale):
            if self.streamed is None:
                sample = run()
            else:
                batch, tokens, _ = image.shape
                sample = self.streamed.step(tokens, words.shape[1], batch, len(self.expected(timestep.dtype)), run)
        sample = sample.to(hidden_states.device, hidden_states.dtype)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def check_hooks(self) -> None:
        """UserError if something else moves single layers: blocks use weights of layers that they do not call."""
        if self.engine.final_layer.linear.bias.is_meta:
            other = "enable_sequential_cpu_offload"
        elif any("_diffusers_hook" in vars(module) for module in self.modules()):
            other = "group offloading"
        else:
            return
        raise UserError(
            f"{other} does not know the layers of this transformer; it streams its blocks by itself, if loaded with "
            'vram="8GB", beside enable_model_cpu_offload()'
        )

    def rows(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> StepModulation:
        """The modulation of this step, looked up by the values that it depends on."""
        call = Call(timestep.float(), pooled, guidance if self.engine.config.guidance else None)
        now = float(call.timestep[0])
        if self.timesteps and now > self.timesteps[-1]:  # noise again: another picture
            self.before, self.timesteps = self.timesteps, []
        if now not in self.timesteps[-1:]:
            self.timesteps.append(now)
        return self.modulation.rows([call], self.place, self.dtype, lambda: self.ahead(call, timestep.dtype))[0]

    def ahead(self, call: Call, dtype: torch.dtype) -> list[Call]:
        """The calls that follow if a pipeline goes on as expected; it passes its timesteps in `dtype`."""
        times = torch.tensor(self.expected(dtype), device=call.timestep.device)
        here = (times == call.timestep[0]).nonzero().flatten().tolist()
        later = times[here[0] + 1 :] if here else ()
        return [call._replace(timestep=time.expand(len(call.timestep))) for time in later]

    def expected(self, dtype: torch.dtype) -> list[float]:
        """Timesteps of this picture: the scheduler's, if it is known, else those of the picture before."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        return self.before if timesteps is None else (timesteps.to(dtype) / 1000).float().tolist()

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """config.json, and the weights as they are packed, in BFL names: a GGUF file, or safetensors for FP8 and
        16 bits. `from_pretrained`, `load` and every reader of such files take it. LoRAs are not saved."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_transformer(self.engine, folder)
        self.save_config(folder)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        **_: object,
    ) -> "EngineTransformer":
        """What `save_pretrained` wrote; called by `DiffusionPipeline.from_pretrained`. device_map: one device."""
        transformer = load(Path(path, subfolder or ""), dtype=torch_dtype)
        place = device_map.get("") if isinstance(device_map, Mapping) else device_map
        if device_map is not None and place is None:
            raise UserError("this transformer goes to one device as a whole: device_map='cuda'; or load it with vram=")
        return transformer if place is None else transformer.to(choose_device(place)[0])


@cache
def transformer_class() -> type[EngineTransformer]:
    """EngineTransformer as a model of diffusers, which pipelines insist on."""
    from diffusers import ConfigMixin, ModelMixin

    names = {"__module__": __name__, "config_name": "config.json"}
    return type("FluxQuantTransformer", (EngineTransformer, ModelMixin, ConfigMixin), names)


def __getattr__(name: str) -> type:
    """Names that need diffusers. A saved pipeline looks for its transformer's class, and that one's parent, here."""
    if name == "FluxQuantTransformer":
        return transformer_class()
    if name == "ModelMixin":
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__} has no attribute {name}")


def load(
    path: str | Path,
    vram: str | None = None,
    ram: str | None = None,
    compute: str = "16-bit",
    device: str = "auto",
    dtype: torch.dtype | None = None,
    log: Log = lambda line: None,
) -> EngineTransformer:
    """A FLUX.1 transformer of any file that can be read, for any FLUX pipeline of diffusers.

    vram: what the GPU may hold in all, "8GB"; blocks stream within it. Without it the transformer is an ordinary module
    that the pipeline moves. ram: the most RAM for weights that stream. compute: "int8" or "fp8" products in the blocks.
    device: where it will run; "auto" is the GPU if there is one, else the processor, where nothing has to be streamed.
    dtype: of the activations, bfloat16 on a GPU and float32 elsewhere. log: gets the plan, and changes of it.
    UserError for a file that is none, with what it is.
    """
    if compute not in COMPUTES:
        raise UserError(f"compute {compute} is unknown; choose one of {', '.join(COMPUTES)}")
    place, usual = choose_device(device)
    memory = memory_of(place, vram, ram, log)
    engine = load_flux(path)
    prepare(engine, place, compute, inf if memory is None else memory.host.pinned)
    transformer = transformer_class()(engine, None, memory, compute)
    return nn.Module.to(transformer, usual if dtype is None else dtype)  # diffusers' own complains of any cast


def memory_of(place: torch.device, vram: str | None, ram: str | None, log: Log) -> Memory | None:
    """Of a GPU under a budget; None where nothing streams."""
    if vram is None and ram is None:
        return None
    if place.type != "cuda":
        warnings.warn(f"vram={vram}, ram={ram}: about a CUDA GPU; on {place.type} nothing streams", stacklevel=3)
        return None
    return Memory.of(place, vram, ram, log)
