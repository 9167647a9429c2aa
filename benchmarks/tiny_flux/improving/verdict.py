"""Is the candidate better? Both drew the same captions from the same noise, so pictures are compared in pairs."""

import math
from dataclasses import dataclass

from torch import Tensor

SURE = 2.0  # standard errors of a gain that counts
LEAST_DB = 0.05  # what nobody sees is no gain, however sure
TOLERATED = 1.0  # standard errors of a loss that does not count against a sure gain of the other kind


@dataclass(frozen=True)
class Outcome:
    """Of one side, picture by picture: whether the right emoji is shown, (n,) bool, and dB, (m,)."""

    right: Tensor
    db: Tensor

    def figures(self) -> dict[str, float]:
        return dict(accuracy=self.right.double().mean().item(), db=self.db.double().mean().item())


def errors_of(before: Outcome, after: Outcome) -> tuple[float, float]:
    """The gain in right pictures and in dB, in standard errors of pairs; 0 where nothing differs."""
    gained = int((after.right & ~before.right).sum())
    lost = int((before.right & ~after.right).sum())
    gain = (after.db - before.db).double()
    spread = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    mean = gain.mean().item()
    in_db = mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return (gained - lost) / math.sqrt(gained + lost) if gained + lost else 0.0, in_db


def compare(before: Outcome, after: Outcome) -> dict[str, object]:
    """The figures of both sides, and whether the candidate is better: surely in one, in the other at least no worse."""
    right, db = errors_of(before, after)
    nearer = db >= SURE and (after.db - before.db).double().mean().item() >= LEAST_DB
    finite = bool(after.db.isfinite().all())
    better = finite and (right >= SURE and db > -TOLERATED or nearer and right > -TOLERATED)
    return dict(
        pictures=[len(after.right), len(after.db)],
        before=before.figures(),
        after=after.figures(),
        gain_in_right_pictures=round(right, 2) if math.isfinite(right) else None,
        gain_in_db=round(db, 2) if math.isfinite(db) else None,
        unit="standard errors of pairs",
        verdict="candidate" if better else "shipped",
    )
