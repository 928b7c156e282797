"""The contestants: which grids weights and activations may take, and how their scales are found."""

from __future__ import annotations

from dataclasses import dataclass

from format_study.grids import GRIDS, Grid


@dataclass(frozen=True)
class Format:
    """One contestant; of several grids each tensor takes the one of least error.

    ``hardware``: integer or float multiply-add units can compute it (the code book needs a look-up per value).
    """

    name: str
    weights: tuple[Grid, ...]
    activations: tuple[Grid, ...]
    search: str = "mse"
    per_channel: bool = True
    hardware: bool = True

    @property
    def searches_scales(self) -> bool:
        """Whether the scale of a channel may change as its weights are rounded on data."""
        return self.per_channel and self.search == "mse"

    @property
    def ours(self) -> bool:
        """Whether it is QFP8."""
        return self.name.startswith("QFP8")


def _of(*names: str) -> tuple[Grid, ...]:
    return tuple(GRIDS[name] for name in names)


_INT8 = (_of("int8"), _of("int8", "uint8"))
_AUTO = _of("QFP8 E1M6", "QFP8 E2M5", "QFP8 E3M4", "QFP8 UE1M7", "QFP8 UE2M6", "QFP8 UE3M5")
FORMATS = [
    Format("QFP8", _of("QFP8 E2M5", "QFP8 E1M6"), _AUTO),
    Format("QFP8 per tensor", _of("QFP8 E2M5", "QFP8 E1M6"), _AUTO, per_channel=False),
    *(Format(f"QFP8 {layout}", *(_of(f"QFP8 {layout}"),) * 2) for layout in ("E1M6", "E2M5", "E3M4")),
    Format("int8 max per tensor", *_INT8, "max", False),
    Format("int8 max", *_INT8, "max"),
    Format("int8 mse per tensor", *_INT8, "mse", False),
    Format("int8 mse", *_INT8),
    *(Format(name, *(_of(name),) * 2) for name in ("E4M3", "E5M2", "E3M4", "posit8 es 0", "posit8 es 1")),
    Format("NF8", *(_of("NF8"),) * 2, hardware=False),
]
