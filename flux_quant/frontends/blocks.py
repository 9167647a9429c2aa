"""What repeats in a model that we know nothing about.

A block is one of the modules of the same type in an nn.ModuleList, the outermost ones. What lies outside of them is
embedders, heads, the last layer.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from flux_quant.converters.recipe import fallbacks_of
from flux_quant.formats import FORMATS

SMALL = 0.05  # of a model's bytes: lists of less are no blocks worth moving


def block_lists(module: nn.Module) -> list[str]:
    """Paths of the lists of blocks, in the order in which they are defined; empty if nothing repeats."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if len(part) > 1 and len({type(block) for block in part}) == 1 and (nbytes := bytes_of(part)):
            found[path] = nbytes
    least = SMALL * bytes_of(module)
    return [path for path, nbytes in found.items() if nbytes >= least]


def block_names(module: nn.Module) -> list[str]:
    return [f"{path}.{i}" for path in block_lists(module) for i in range(len(module.get_submodule(path)))]


def bytes_of(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def choices(module: nn.Module, format_name: str, keep: Iterable[str] = ()) -> dict[str, str]:
    """Linear -> format, of those in blocks (all, where nothing repeats) that match no glob of `keep`.

    A layer whose inputs are no multiple of the format's block gets the next one that fits, or none.
    """
    names, keep = tuple(f"{name}." for name in block_names(module)), tuple(keep)
    found = {}
    for path, layer in module.named_modules():
        inside = path.startswith(names) if names else True
        if not isinstance(layer, nn.Linear) or not inside or any(fnmatchcase(path, glob) for glob in keep):
            continue
        for name in (format_name, *fallbacks_of(format_name)):
            if FORMATS[name].fits(tuple(layer.weight.shape)):
                found[path] = name
                break
    return found
