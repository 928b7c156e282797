"""The limits a quantized model must keep, checked on the measurements of `scripts/accuracy`."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

RELATIVE_LOSS = 0.003
PERPLEXITY_LOSS = 0.005
MOBILENET_HITS = 1
MOBILENET_AGREEMENT = 0.98
MOBILENET_SQNR_DB = 22.0
PEERS = {"int8": "onnxruntime's int8", "nncf": "NNCF's int8"}


class Bar(NamedTuple):
    """One limit: what is measured, its value, the limit as text, whether it is kept."""

    what: str
    measured: float
    limit: str
    kept: bool


def bars(name: str, found: dict[str, Any]) -> list[Bar]:
    """Limits of the model `name`; `found` is its entry in the JSON, with a runner ``qfp8``."""
    runners = found["runners"]
    checked = [bar for peer in PEERS if peer in runners for bar in _against(runners, peer)]
    if name == "mobilenetv2":
        return [*_mobilenet(runners), *checked]
    limit = PERPLEXITY_LOSS if name == "smollm2" else RELATIVE_LOSS
    for task, scored in runners["qfp8"]["tasks"].items():
        loss, high = scored["relative_loss"], scored["relative_high"]
        checked.append(Bar(f"{task}: relative loss", loss, f"<= {limit}", loss <= limit))
        checked.append(Bar(f"{task}: 95 % bound", high, f"<= {2 * limit}", high <= 2 * limit))
    return checked


def _against(runners: dict[str, Any], peer: str) -> list[Bar]:
    """Bars of the model, not of each task: on one task the better of two is often luck."""
    loss, other = (
        statistics.fmean(task["relative_loss"] for task in runners[runner]["tasks"].values())
        for runner in ("qfp8", peer)
    )
    sqnr, others = (runners[runner]["sqnr_db"] for runner in ("qfp8", peer))
    return [
        Bar("relative loss, mean of the tasks", loss, f"<= {PEERS[peer]} {other:.4f}", loss <= other),
        Bar("output SQNR, dB", sqnr, f"> {PEERS[peer]} {others:.1f}", sqnr > others),
    ]


def _mobilenet(runners: dict[str, Any]) -> list[Bar]:
    qfp8 = runners["qfp8"]
    lost = round(qfp8["tasks"]["photos"]["loss"] * qfp8["tasks"]["photos"]["items"])
    agreement, sqnr = qfp8["agreement"], qfp8["sqnr_db"]
    return [
        Bar("photos: hits lost", lost, f"<= {MOBILENET_HITS}", lost <= MOBILENET_HITS),
        Bar("top-1 agreement", agreement, f">= {MOBILENET_AGREEMENT}", agreement >= MOBILENET_AGREEMENT),
        Bar("logit SQNR, dB", sqnr, f">= {MOBILENET_SQNR_DB}", sqnr >= MOBILENET_SQNR_DB),
    ]
