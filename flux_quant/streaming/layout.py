"""Where the tensors of a block lie in one flat buffer, and which tensors belong to which block.

Tensors that overlap in memory (tied weights, views of one storage) stay overlapping: their bytes are moved once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flux_quant.errors import UserError

ALIGN = 256  # bytes: enough for views of any dtype, for vector loads of kernels, and for compilers' alignment checks

REST, NOBODY = -1, -2  # owners of tensors beside the numbers of blocks

Span = tuple[object, int, int]  # address space, first byte, one past the last


@dataclass(frozen=True)
class Member:
    tensor: Tensor
    offset: int  # in the flat buffer, bytes
    nbytes: int  # from its first to its last element, gaps of its strides included


@dataclass(frozen=True)
class BlockLayout:
    """A flat buffer of `nbytes` for all tensors of a block; starts of separate pieces of memory are aligned."""

    name: str
    members: tuple[Member, ...]
    nbytes: int

    @property
    def tensors(self) -> list[Tensor]:
        return [member.tensor for member in self.members]

    def views(self, flat: Tensor) -> list[Tensor]:
        """flat (>= nbytes) uint8 on any device -> a view for each member: its dtype, size and strides."""
        return [view(flat, member) for member in self.members]


@dataclass(frozen=True)
class ModuleLayout:
    blocks: tuple[BlockLayout, ...]
    rest: BlockLayout  # what lies outside of all blocks, or is shared by several


@dataclass
class Piece:
    """Tensors that overlap, as (number of the tensor, its first byte, one past its last)."""

    spans: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def start(self) -> int:
        return min(start for _, start, _ in self.spans)

    @property
    def nbytes(self) -> int:
        return max(end for _, _, end in self.spans) - self.start


def over(memory: Tensor, dtype: torch.dtype, first: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A plain tensor over the storage that `memory` lies in, from byte `first` on. Copies nothing."""
    with torch.inference_mode(False), torch.no_grad():
        empty = torch.empty(0, dtype=dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), first // dtype.itemsize, size, stride)


def view(flat: Tensor, member: Member) -> Tensor:
    like = member.tensor
    first = flat.storage_offset() + member.offset
    if first % like.element_size():
        raise UserError(f"a {like.dtype} tensor that overlaps another one starts within one of its elements")
    return over(flat, like.dtype, first, like.size(), like.stride())


def alias(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor, whatever subclass or leaf of autograd `tensor` is."""
    first = tensor.storage_offset() * tensor.element_size()
    return over(tensor, tensor.dtype, first, tensor.size(), tensor.stride())


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor from its first to its last element, (bytes,) uint8. Copies nothing."""
    _, start, end = span(tensor)
    return over(tensor, torch.uint8, tensor.storage_offset() * tensor.element_size(), (end - start,), (1,))


def span(tensor: Tensor) -> Span:
    """Where a tensor lies; on the meta device, which has no addresses, within its storage."""
    size = tensor.element_size()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = size * (1 + reach) if tensor.numel() else 0
    if tensor.device.type == "meta":
        start = tensor.storage_offset() * size
        return tensor.untyped_storage()._cdata, start, start + nbytes
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + nbytes


def pieces(tensors: Sequence[Tensor]) -> list[Piece]:
    """Tensors grouped by overlap, in order of first appearance."""
    spans = [(span(tensor), i) for i, tensor in enumerate(tensors)]
    spans.sort(key=lambda row: (str(row[0][0]), row[0][1:]))
    found: list[Piece] = []
    last: tuple[object, int] = (None, 0)  # address space and end of the newest piece
    for (space, start, end), i in spans:
        if start == end:  # nothing there to overlap with
            found.insert(0, Piece([(i, start, end)]))
            continue
        if space != last[0] or start >= last[1]:
            found.append(Piece())
            last = (space, end)
        found[-1].spans.append((i, start, end))
        last = (space, max(end, last[1]))
    return sorted(found, key=lambda piece: min(i for i, _, _ in piece.spans))


def lay_out(name: str, tensors: Sequence[Tensor]) -> BlockLayout:
    members: dict[int, Member] = {}
    offset = 0
    for piece in pieces(tensors):
        for i, start, end in piece.spans:
            members[i] = Member(tensors[i], offset + start - piece.start, end - start)
        offset += -(-piece.nbytes // ALIGN) * ALIGN
    return BlockLayout(name, tuple(members[i] for i in range(len(tensors))), offset)


def module_layout(
    module: nn.Module,
    blocks: Sequence[str],
    extra: Mapping[str, Sequence[Tensor]] | None = None,
    exclude: Iterable[str] = (),
) -> ModuleLayout:
    """Parameters and buffers of a module by block; works on the meta device.

    blocks: module paths. extra: path -> further tensors that belong to a block (factors of adapters). exclude: globs on
    full names of tensors to leave out, wherever they are. A tensor that shares memory with one outside of its block
    goes to the rest. UserError for a block that is not there or lies in another one, and for tensors that are not
    plain memory.
    """
    check_paths(module, blocks, extra or {})
    owners: dict[int, list[int]] = {}  # id of a tensor -> its owners
    tensors: dict[int, Tensor] = {}
    for owner, name, tensor in owned(module, blocks, extra or {}, list(exclude)):
        check_plain(name, tensor)
        tensors[id(tensor)] = tensor
        owners.setdefault(id(tensor), []).append(owner)
    shares: dict[int, list[Tensor]] = {owner: [] for owner in range(NOBODY, len(blocks))}
    everything = list(tensors.values())
    place: dict[int, int] = {}
    for piece in pieces(everything):
        inside = {owner for i, _, _ in piece.spans for owner in owners[id(everything[i])]}
        for i, _, _ in piece.spans:
            own = owners[id(everything[i])]
            place[i] = NOBODY if set(own) == {NOBODY} else next(iter(inside)) if len(inside) == 1 else REST
    for i, tensor in enumerate(everything):
        shares[place[i]].append(tensor)
    layouts = tuple(lay_out(name, shares[i]) for i, name in enumerate(blocks))
    return ModuleLayout(layouts, lay_out("the rest", shares[REST]))


def owned(
    module: nn.Module, blocks: Sequence[str], extra: Mapping[str, Sequence[Tensor]], exclude: list[str]
) -> Iterator[tuple[int, str, Tensor]]:
    """(owner, name, tensor) of everything, tensors of several owners several times."""
    number = {name: i for i, name in enumerate(blocks)}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        path = name.split(".")
        prefixes = (".".join(path[:i]) for i in range(1, len(path)))
        owner = next((number[prefix] for prefix in prefixes if prefix in number), REST)
        yield NOBODY if any(fnmatchcase(name, glob) for glob in exclude) else owner, name, tensor
    for block, tensors in extra.items():
        yield from ((number[block], f"extra tensor of {block}", tensor) for tensor in tensors)


def check_paths(module: nn.Module, blocks: Sequence[str], extra: Iterable[str]) -> None:
    known = dict(module.named_modules(remove_duplicate=False))
    listed = set(blocks)
    for name in blocks:
        if name not in known or not name:
            raise UserError(f"there is no block {name!r} in {type(module).__name__}")
        if parents := [other for other in listed if name.startswith(f"{other}.")]:
            raise UserError(f"block {name} lies in block {parents[0]}; list one of the two")
    if len(listed) != len(blocks):
        raise UserError(f"{len(blocks)} blocks are listed, but only {len(listed)} different ones")
    if len({id(known[name]) for name in blocks}) != len(blocks):
        raise UserError("one module is listed as two blocks")
    if strange := sorted(set(extra) - listed):
        raise UserError(f"extra tensors belong to {strange[0]}, which is not a block")


def check_plain(name: str, tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise UserError(f"{name} is a {type(tensor).__name__} whose memory cannot be pointed elsewhere")


def block_bytes(
    module: nn.Module,
    blocks: Sequence[str],
    extra: Mapping[str, Sequence[Tensor]] | None = None,
    exclude: Iterable[str] = (),
) -> tuple[tuple[int, ...], int]:
    """Bytes of each block, as a plan needs them, and of the rest; works on the meta device."""
    layout = module_layout(module, blocks, extra, exclude)
    return tuple(block.nbytes for block in layout.blocks), layout.rest.nbytes
