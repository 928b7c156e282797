"""What re-estimating BatchNorm's statistics came to, for torch models and imported graphs alike."""

from __future__ import annotations

from dataclasses import dataclass

HOLD_OUT_EVERY = 4
"""Every so many batches one is held out, to compare old and new statistics on."""
LEAST_GAIN = 0.01
"""In log-likelihood, as a mean moved by 0.14 deviations gives: statistics of some thousand images differ by less."""

LEAST_IMAGES = 256
"""Without a metric to judge by. Fewer make statistics of a few scenes, which describe other images of the same kind
better than those of training do, and yet the network gets worse (MobileNetV2 with 36 photos, scripts/batchnorm.py)."""


@dataclass(frozen=True)
class Recalibration:
    """What ``recalibrate_batchnorm`` did."""

    taken: int
    """Layers with new statistics."""
    layers: int
    """BatchNorm layers."""
    batches: int
    """Batches (for an imported graph: samples) that the new statistics come from."""
    before: float | None
    """Score with the old statistics, higher for better; None where nothing was tried."""
    after: float | None
    """Score with the new ones."""
    reason: str = ""
    """Why nothing was tried."""

    @property
    def kept_old(self) -> bool:
        """The new statistics were no better, and the model is as it was."""
        return self.taken == 0

    def __str__(self) -> str:
        what = "kept the old" if self.kept_old else "took new"
        which = f"{self.taken} of {self.layers}" if 0 < self.taken < self.layers else f"{self.layers}"
        if self.reason:
            return f"{what} statistics of {which} BatchNorm layers: {self.reason}"
        return (
            f"{what} statistics of {which} BatchNorm layers, from {self.batches} batches: "
            f"score {self.before:.6g} with the old, {self.after:.6g} with the new"
        )
