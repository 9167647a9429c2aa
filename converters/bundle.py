"""All-in-one files and pipeline folders from parts, and parts from those. Nothing is requantized.

`split`   every model of a file or folder into a file of its own, in canonical names
`merge`   models from several files into one file under ComfyUI's prefixes, or into a folder as a diffusers pipeline
"""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import flux_quant
from flux_quant import arch
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.component import Component, components, describe
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.description import kept_metadata
from flux_quant.converters.fp8_layout import Fp8Form
from flux_quant.converters.output import OutputFile, OutputFolder, check_target
from flux_quant.converters.plan import make_plan
from flux_quant.converters.recipe import GGUF, KEEP, SAFETENSORS
from flux_quant.converters.targets import LABELS, TARGETS
from flux_quant.converters.writer import CheckpointWriter, FilePlan
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

Progress = Callable[[str, int, int], None]

FOLDERS = {  # family -> (folder of a diffusers pipeline, library, class)
    "FLUX.1": ("transformer", "diffusers", "FluxTransformer2DModel"),
    "VAE": ("vae", "diffusers", "AutoencoderKL"),
    "CLIP-L": ("text_encoder", "transformers", "CLIPTextModel"),
    "T5 encoder": ("text_encoder_2", "transformers", "T5EncoderModel"),
}
TOKENIZERS = {  # our folder -> (folder of a pipeline, class)
    "clip": ("tokenizer", "CLIPTokenizer"),
    "t5": ("tokenizer_2", "T5TokenizerFast"),
}
SCHEDULER = {  # of FLUX.1; [schnell] has no shift
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


@dataclass(frozen=True)
class Written:
    path: Path
    family: str
    tensors: int
    bytes: int


def split(source: Path, folder: Path, force: bool, progress: Progress = lambda *_: None) -> list[Written]:
    """Every model of `source` as a file in `folder`, GGUF where a weight is in a GGUF format."""
    found = known_components([source])
    folder.mkdir(exist_ok=True)
    files = []
    for component in found:
        infos = in_order(component)
        blocked = any(FORMATS[info.format].block > 1 for info in infos)
        family = component.family.name
        path = folder / f"{TARGETS[family].file_name}{GGUF if blocked else SAFETENSORS}"
        metadata = {} if blocked else own_metadata(component)
        files.append(FilePlan(path, tuple(infos), metadata, {} if blocked else form_of([component])))
    for file in files:
        check_target(file.path, force)
    done, total = 0, sum(info.numel for file in files for info in file.infos)
    written = []
    with ExitStack() as stack:
        writers = [stack.enter_context(CheckpointWriter([file], force)) for file in files]
        for component, file, writer in zip(found, files, writers, strict=True):
            for info in file.infos:
                writer.write(info.name, component.read(info.name))
                component.forget(info.name)
                done += info.numel
                progress("copying", done, total)
            writer.flush()
            written.append(Written(file.path, component.family.name, len(file.infos), writer.nbytes))
    return written


def merge(sources: Sequence[Path], target: Path, force: bool, progress: Progress = lambda *_: None) -> Written:
    """The models of all sources in one safetensors file, as ComfyUI's checkpoint loader takes it."""
    found = known_components(sources)
    if target.suffix.lower() != SAFETENSORS:
        raise UserError(f"{target}: all-in-one files are .safetensors")
    check_target(target, force)
    infos, origin = [], {}
    for component in found:
        family = component.family.name
        prefix = TARGETS[family].prefix
        if prefix is None:
            raise UserError(f"{component.path}: a {family} has no place in an all-in-one file")
        for info in in_order(component):
            name = prefix + info.name
            infos.append(TensorInfo(name, info.shape, info.format))
            origin[name] = component, info.name
    metadata = own_metadata(next((c for c in found if c.family.name == "FLUX.1"), found[0]))
    file = FilePlan(target, tuple(infos), metadata, form_of(found))
    done, total = 0, sum(info.numel for info in infos)
    with CheckpointWriter([file], force) as writer:
        for info in infos:
            component, name = origin[info.name]
            writer.write(info.name, component.read(name))
            component.forget(name)
            done += info.numel
            progress("copying", done, total)
        writer.flush()
    return Written(target, " + ".join(c.family.name for c in found), len(infos), target.stat().st_size)


def known_components(sources: Sequence[Path]) -> list[Component]:
    """All models of all sources, each family once. UserError for a source without one."""
    found: dict[str, Component] = {}
    for source in sources:
        reader = open_checkpoint(source)
        own = [component for component in components(reader) if component.family.name in LABELS]
        if not own:
            raise UserError(f"{source} is {describe(reader, own)}")
        for component in own:
            family = component.family.name
            if family in found:
                raise UserError(f"{source} and {found[family].path} both hold a {family}; leave one of them out")
            if component.foreign:
                first = next(iter(component.foreign.values()))
                raise UserError(f"{source}: {first.name} has the type {first.format}, which cannot be copied")
            found[family] = component
    return [found[family] for family in LABELS if family in found]


def in_order(component: Component) -> list[TensorInfo]:
    return sorted(component.tensors.values(), key=lambda info: arch.running_order(info.name))


def own_metadata(component: Component) -> dict[str, object]:
    return kept_metadata(component) if component.container == "safetensors" else {}


def form_of(found: Sequence[Component]) -> dict[str, object]:
    """Activation scales stay with their weights."""
    scales = {}
    for component in found:
        prefix = TARGETS[component.family.name].prefix or ""
        scales |= {prefix + name: scale for name, scale in component.input_scales.items()}
    return {"fp8_form": Fp8Form(input_scales=scales)}


# --- diffusers pipelines ----------------------------------------------------------------------------------------------


def merge_folder(
    sources: Sequence[Path], target: Path, tokenizers: Path | None, force: bool, progress: Progress = lambda *_: None
) -> Written:
    """A folder that diffusers' FluxPipeline loads. `tokenizers`: a folder with `clip` and `t5`, or a pipeline's own."""
    found = known_components(sources)
    index: dict[str, object] = {"_class_name": "FluxPipeline", "_flux_quant_version": flux_quant.__version__}
    if missing := [LABELS[family] for family in FOLDERS if family not in {c.family.name for c in found}]:
        raise UserError(f"a pipeline needs all four models; missing: {', '.join(missing)}")
    tensors = 0
    with OutputFolder(target, force) as folder:
        for component in found:
            if component.family.name not in FOLDERS:
                raise UserError(f"{component.path}: a {component.family.name} has no place in a FLUX.1 pipeline")
            name, library, kind = FOLDERS[component.family.name]
            index[name] = [library, kind]
            tensors += copy_model(component, folder.staging / name, progress)
        for name, (place, kind) in TOKENIZERS.items():
            shutil.copytree(tokenizer_folder(tokenizers, name, place), folder.staging / place)
            index[place] = ["transformers", kind]
        guided = any(name.startswith("guidance_in.") for c in found for name in c.tensors)
        scheduler = SCHEDULER | {"use_dynamic_shifting": guided, "shift": 3.0 if guided else 1.0}
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        write_json(folder.staging / "scheduler" / "scheduler_config.json", scheduler)
        write_json(folder.staging / "model_index.json", index)
        nbytes = sum(path.stat().st_size for path in folder.staging.rglob("*") if path.is_file())
    return Written(target, " + ".join(c.family.name for c in found), tensors, nbytes)


def copy_model(component: Component, folder: Path, progress: Progress) -> int:
    """One model under its library's names; what is quantized becomes BF16, which is all that the library reads."""
    label = LABELS[component.family.name]
    plan = make_plan(Conversion(component.path, folder, KEEP, components=(label,), folder=True))
    return run(plan, progress).total.tensors


def tokenizer_folder(root: Path | None, *names: str) -> Path:
    if root is None:
        raise UserError("a pipeline needs tokenizers; name a folder that has them with --tokenizers")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root} holds no folder {' or '.join(names)} with a tokenizer")
    return folder


def write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(content, indent=2) + "\n").encode()
    with OutputFile(path, len(data)) as file:
        file.write(0, data)
