"""The speeds that compiled nonlinear layers must reach, checked on the measurements of `scripts/bench functions`."""

from __future__ import annotations

from typing import Any

from zoo.bars import Bar

TWICE = ("gelu", "silu", "mish", "softplus", "erf", "elu", "softmax_128", "softmax_1024")
FACTORS = {**dict.fromkeys(TWICE, 2.0), "tanh": 1.6, "sigmoid": 1.3, "exp": 1.3, "layer_norm": 1.2}
COPY_SHARE = {"sigmoid": 0.8, "exp": 0.8}
NEVER_SLOWER = ("gelu", "mish", "softplus", "erf")
PEERS = ("torch", "onnxruntime")


def bars(row: dict[str, Any]) -> list[Bar]:
    """The bars of one function and size on this machine's own instruction set."""
    name, size = row["function"], row["size"]
    speedup, small = row["speedup"]["native 0.001"], row["speedup"]["native 0.0001"]
    found = []
    if name in FACTORS:
        factor, share = FACTORS[name], COPY_SHARE.get(name)
        measured = _least(speedup)
        kept = measured >= factor or (share is not None and speedup["copy"] >= share)
        limit = f">= {factor}" + (f", or {share} of copy ({speedup['copy']:.2f})" if share else "")
        found.append(Bar(f"{name}, {size}, 1e-3: times the faster peer", measured, limit, kept))
    if name in NEVER_SLOWER:
        measured = _least(small)
        found.append(Bar(f"{name}, {size}, 1e-4: times the faster peer", measured, ">= 1.0", measured >= 1.0))
    measured = speedup["fast math"]
    found.append(Bar(f"{name}, {size}, 1e-3: times TVM's fast math", measured, "> 1.0", measured > 1.0))
    return found


def _least(speedup: dict[str, float]) -> float:
    return min(speedup[peer] for peer in PEERS if peer in speedup)
