"""Does a picture show what was asked for? The bundled model's judge (`tiny_flux.judge`), for its fixed captions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from flux_quant.benchmarks.quality.prompts import Wanted
from flux_quant.benchmarks.tiny_flux.emoji import FONT, EmojiWorld
from flux_quant.benchmarks.tiny_flux.judge import Group, Request, candidates, nearest


@dataclass(frozen=True)
class Judge:
    """Keeps what it compares with, in float16: 270 MB for each of the two kinds of captions."""

    world: EmojiWorld
    kept: dict[Request, list[Group]] = field(default_factory=dict)

    def groups(self, request: Request) -> list[Group]:
        if request not in self.kept:
            self.kept[request] = [(first, group.half()) for first, group in candidates(self.world, request)]
        return self.kept[request]

    def right(self, pictures: Tensor, wanted: Sequence[Wanted]) -> list[float]:
        """pictures (n, 3, 96, 96) in 0-1 -> 1.0 for each whose nearest emoji is the one wanted, else 0.0."""
        requests = [Request(w.size, w.position if w.size == "small" else None, w.colour) for w in wanted]
        out = [0.0] * len(wanted)
        for request in dict.fromkeys(requests):
            rows = [i for i, other in enumerate(requests) if other == request]
            found = nearest(self.world, pictures[rows], request, self.groups(request)).emoji.tolist()
            for i, emoji in zip(rows, found, strict=True):
                out[i] = float(self.world.names[emoji] == wanted[i].name)
        return out


def open_judge() -> tuple[Judge | None, str]:
    """The judge, or why there is none."""
    try:
        return Judge(EmojiWorld()), ""
    except ImportError as error:
        return None, f"retrieval accuracy left out: {error}; it needs fonttools (flux_quant[train]) and Python 3.11"
    except OSError:
        return None, f"retrieval accuracy left out: it needs {FONT} (Debian: fonts-noto-color-emoji)"
