"""What a picture takes on the device: bytes of weights, of activations at their peak, of everything beside them.

The formulas follow the engine (`model`, `kernels.fused`) line by line; tests count the live bytes of its tensors and
hold the formulas to them. Weights are counted as the engine keeps them: matrices as stored, the rest in float32.
Modulation is hoisted: its weights pass through once before the first step and leave their results behind.

Letters: B batch, L tokens (T text, S image), D hidden width, M width of the MLP; a unit is B L D values of the
activations' dtype.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from flux_quant.arch import FluxConfig, block_of, running_order
from flux_quant.errors import UserError
from flux_quant.formats import Shape, format_named

Tensors = Mapping[str, tuple[Shape, str]]  # canonical name -> unpacked shape, name of the format

PATCH = 16  # pixels of a token's side
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
FORMAT_OF = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}  # the format that is multiplied as it lies
COMPUTE = ("float", "int8", "fp8")  # dtype of the products in the blocks: the activations' own, or 8 bits

ALIGNMENT = 256  # of each tensor in a block's one buffer
CONTEXT = 400_000_000  # CUDA's own, with the code of kernels: users report about this much; the driver decides
CUBLAS = {(0, 0): 8 << 20, (9, 0): 32 << 20}  # workspace that torch gives it, by lowest compute capability
FRAGMENTS = 0.1  # of the activations: what torch's allocator may hold beyond what lives; an allowance, not measured
SCRATCH_SHARE, SCRATCH_LEAST, SCRATCH_MOST = 128, 32 << 20, 132 << 20  # as `kernels.triton_path.scratch_bytes`
CODEC_SCRATCH = 4 * (64 << 20)  # of torch alone: what the codecs' temporaries take at most of 64 MiB slices
ACCUMULATORS = 32 << 20  # of int8 products in torch, which stay in slices of this size

HOISTED = ("_mod.", ".modulation.", "adaLN_modulation.", "time_in.", "vector_in.", "guidance_in.")

T5_HEADS, T5_CHANNELS = 64, 64


@dataclass(frozen=True)
class Work:
    """What is to be made."""

    size: tuple[int, int] = (1024, 1024)  # width, height in pixels
    batch: int = 1
    words: int = 512  # tokens of T5
    steps: int = 20
    passes: int = 1  # of the transformer in a step: 2 with a negative prompt
    compute: str = "float"
    adapters: bool = False  # LoRAs that make outputs of their own; factors are counted as tensors of their blocks
    controlnets: int = 0  # bytes of ControlNets, which stay on the device
    nets: tuple["Net", ...] = ()  # their blocks
    reference: int = 0  # tokens of a picture that is seen, not drawn

    def __post_init__(self) -> None:
        for side in self.size:
            if side < PATCH or side % PATCH:
                raise UserError(f"size {self.size[0]}x{self.size[1]}: both sides must be multiples of {PATCH}")
        for name in ("batch", "words", "steps", "passes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: at least 1 is needed")
        if self.compute not in COMPUTE:
            raise UserError(f"compute {self.compute}: choose one of {', '.join(COMPUTE)}")

    @property
    def image_tokens(self) -> int:
        return self.size[0] // PATCH * (self.size[1] // PATCH) + self.reference

    @property
    def tokens(self) -> int:
        return self.words + self.image_tokens

    @property
    def latent(self) -> tuple[int, int]:
        return self.size[1] // 8, self.size[0] // 8


@dataclass(frozen=True)
class Block:
    """One block without its modulation."""

    name: str
    nbytes: int
    modulation: int  # bytes
    weights: int  # values of its matrices
    packed: Mapping[str, tuple[int, int]]  # format -> (values, bytes) of matrices

    @property
    def is_double(self) -> bool:
        return self.name.startswith("double_blocks")

    def unpacked(self, dtype: str) -> tuple[int, int]:
        """(values, bytes) of the matrices that are not multiplied as they lie."""
        rows = [row for name, row in self.packed.items() if name != FORMAT_OF[dtype]]
        return sum(values for values, _ in rows), sum(nbytes for _, nbytes in rows)


@dataclass(frozen=True)
class Model:
    """A transformer's sizes: its blocks in running order, and bytes of what lies outside them."""

    config: FluxConfig
    blocks: tuple[Block, ...]
    outside: int  # bytes that stay on the device: embedders of tokens, the last layer
    hoisted: int  # bytes outside the blocks that are needed before the first step only

    @classmethod
    def of(cls, tensors: Tensors) -> "Model":
        """UserError if these are not the tensors of a FLUX.1 transformer."""
        config = FluxConfig.from_shapes({name: shape for name, (shape, _) in tensors.items()})
        blocks, outside = blocks_of(tensors)
        before = {name: kind for name, kind in outside.items() if is_hoisted(name)}
        return cls(config, blocks, buffer_bytes(outside) - buffer_bytes(before), buffer_bytes(before))

    @property
    def modulation(self) -> int:
        """Bytes that pass through the device once, before the first step."""
        return self.hoisted + sum(block.modulation for block in self.blocks)

    @property
    def largest(self) -> int:
        return max(block.nbytes for block in self.blocks)

    @property
    def nbytes(self) -> int:
        return self.outside + self.modulation + sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True)
class Net:
    """A ControlNet's blocks, as wide as the model's."""

    blocks: tuple[Block, ...]
    share: float = 1.0  # of the steps in which it acts
    streamed: bool = False  # each kind of block passes through two slots

    @classmethod
    def of(cls, tensors: Tensors, share: float = 1.0, streamed: bool = False) -> "Net":
        return cls(blocks_of(tensors)[0], share, streamed)


def blocks_of(tensors: Tensors) -> tuple[tuple[Block, ...], dict[str, tuple[Shape, str]]]:
    """In running order, and the tensors outside of them."""
    groups: dict[str, dict[str, tuple[Shape, str]]] = {}
    for name in sorted(tensors, key=running_order):
        groups.setdefault(block_of(name), {})[name] = tensors[name]
    outside = groups.pop("outside blocks", {})
    return tuple(block_from(name, group) for name, group in groups.items()), outside


def block_from(name: str, tensors: Tensors) -> Block:
    own = {tensor: kind for tensor, kind in tensors.items() if not is_hoisted(tensor)}
    packed: dict[str, tuple[int, int]] = {}
    for shape, fmt in own.values():
        if len(shape) > 1:
            values, nbytes = packed.get(fmt, (0, 0))
            packed[fmt] = values + prod(shape), nbytes + format_named(fmt).nbytes(shape)
    weights = sum(values for values, _ in packed.values())
    return Block(name, buffer_bytes(own), buffer_bytes(tensors) - buffer_bytes(own), weights, packed)


def is_hoisted(name: str) -> bool:
    return any(part in name for part in HOISTED)


def buffer_bytes(tensors: Tensors) -> int:
    """Tensors one after the other in a buffer, as the engine keeps them."""
    return sum(-(-stored_bytes(*kind) // ALIGNMENT) * ALIGNMENT for kind in tensors.values())


def stored_bytes(shape: Shape, fmt: str) -> int:
    return format_named(fmt).nbytes(shape) if len(shape) > 1 else 4 * prod(shape)


# --- Activations ------------------------------------------------------------------------------------------------------


def activation_bytes(config: FluxConfig, work: Work, dtype: str, fused: bool) -> int:
    """Live bytes at the worst moment of a pass; `fused`: with our pointwise kernels, else by torch alone.

    In units, with m = M / D and s = S / L. Two are what came into the block list and what came into this block.

    Single block, by kernels: 2 + qkv and MLP (3 + m) + q, k (2) + attention's output (1). By torch, when the last
    linear's input is put together: 2 + (3 + m) + attention's output, in two layouts (2) + GELU (m) + its input (1 + m).

    Double block, in the image's MLP: 1 + qkv of both streams (3) + attention's output (1), and of the image alone the
    new stream, its norm, the hidden values, the result: s (3 + m).

    8-bit products add a byte per value of a linear's input; an adapter its own output and the sum of both.
    """
    item = BYTES[dtype]
    unit = work.batch * work.tokens * config.hidden * item
    m, s = config.mlp / config.hidden, work.image_tokens / work.tokens
    codes = 0 if work.compute == "float" else 1 / item
    peaks = [8 + m if fused else 8 + 3 * m, 5 + s * (3 + m + codes * m), 6 + m + codes * (1 + m)]
    if work.adapters:
        peaks += [3 + 3 * (3 + m), 5 + s * (2 + 3 * m)]
    angles = 4 * work.tokens * (config.head_dim + 3 + 2)  # cos, sin; positions
    sums = 4 * work.batch * config.heads * work.tokens  # attention's, kept for a backward pass
    accumulators = ACCUMULATORS if work.compute == "int8" and not fused else 0
    return int(max(peaks) * unit) + angles + sums + accumulators


def state_bytes(config: FluxConfig, work: Work, dtype: str) -> int:
    """What lives through all steps: text, latents (three times: noise, velocity, sum), results of the modulation."""
    item = BYTES[dtype]
    text = work.words * (config.context + config.hidden)
    latents = 3 * work.image_tokens * config.in_channels
    rows = 12 * config.double_blocks + 3 * config.single_blocks + 2
    steering = work.steps * rows * config.hidden
    return work.batch * work.passes * item * (text + latents + steering)


def scratch_bytes(total: int, triton: bool, packed: bool = True) -> int:
    """For unpacked weights: of our kernels by the card's memory, of torch alone for the codecs' temporaries."""
    if not packed:
        return 0
    if not triton:
        return CODEC_SCRATCH
    return max(SCRATCH_LEAST, min(SCRATCH_MOST, total // SCRATCH_SHARE)) // 256 * 256


def workspace_bytes(capability: tuple[int, int]) -> int:
    return CUBLAS[max(lowest for lowest in CUBLAS if lowest <= capability)]


# --- T5 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder's sizes. Its embedding stays in RAM, where a row per token is looked up."""

    blocks: tuple[int, ...]  # bytes
    weights: int  # values of the matrices in its blocks
    hidden: int
    feed_forward: int

    @classmethod
    def of(cls, tensors: Tensors) -> "TextEncoder":
        groups: dict[str, dict[str, tuple[Shape, str]]] = {}
        for name, kind in tensors.items():
            if name.startswith("encoder.block."):
                groups.setdefault(block_of(name), {})[name] = kind
        if not groups:
            raise UserError("not a T5 encoder: it has no encoder.block.0")
        widest = next(shape for name, (shape, _) in tensors.items() if name.endswith("wi_0.weight"))
        matrices = (prod(shape) for group in groups.values() for shape, _ in group.values() if len(shape) > 1)
        return cls(tuple(map(buffer_bytes, groups.values())), sum(matrices), widest[1], widest[0])

    @property
    def nbytes(self) -> int:
        return sum(self.blocks)

    def activation_bytes(self, work: Work) -> int:
        """One prompt, or two, in float32: attention's scores of all heads at once, or the gated feed-forward layer."""
        b, t, d = work.passes, work.words, self.hidden
        heads = d // T5_CHANNELS
        scores = (3 * b + 1) * heads * t * t + 7 * b * t * d
        return 4 * max(scores, b * t * (4 * self.feed_forward + 6 * d))


def t5_xxl(fmt: str) -> TextEncoder:
    """T5 v1.1 XXL, which FLUX.1 uses, with all its matrices in one format."""
    d, ff = T5_HEADS * T5_CHANNELS, 10240
    shapes: Iterable[tuple[str, Shape]] = [
        *((f"layer.0.SelfAttention.{name}.weight", (d, d)) for name in "qkvo"),
        *((f"layer.1.DenseReluDense.{name}.weight", (ff, d)) for name in ("wi_0", "wi_1")),
        ("layer.1.DenseReluDense.wo.weight", (d, ff)),
        *((f"layer.{i}.layer_norm.weight", (d,)) for i in range(2)),
    ]
    return TextEncoder.of({f"encoder.block.{i}.{name}": (shape, fmt) for i in range(24) for name, shape in shapes})
