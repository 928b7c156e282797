"""What re-estimating BatchNorm's statistics came to, for torch models and imported graphs alike."""

from __future__ import annotations

from dataclasses import dataclass

HOLD_OUT_EVERY = 4
"""Every so many batches one is held out, to compare old and new statistics on."""
LEAST_GAIN = 0.01
"""In log-likelihood, as a mean moved by 0.14 deviations gives: statistics of some thousand images differ by less."""


@dataclass(frozen=True)
class Recalibration:
    """What ``recalibrate_batchnorm`` did."""

    taken: int
    """Layers with new statistics."""
    layers: int
    """BatchNorm layers."""
    batches: int
    """Batches (for an imported graph: samples) that the new statistics come from."""
    before: float
    """Score with the old statistics, higher for better."""
    after: float
    """Score with the new ones."""

    @property
    def kept_old(self) -> bool:
        """The new statistics were no better, and the model is as it was."""
        return self.taken == 0

    def __str__(self) -> str:
        what = "kept the old" if self.kept_old else "took new"
        which = f"{self.taken} of {self.layers}" if 0 < self.taken < self.layers else f"{self.layers}"
        return (
            f"{what} statistics of {which} BatchNorm layers, from {self.batches} batches: "
            f"score {self.before:.6g} with the old, {self.after:.6g} with the new"
        )
