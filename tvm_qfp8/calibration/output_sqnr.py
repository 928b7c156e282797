"""What quantization does to a network's outputs: what there is to judge a module by without a score of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tvm

from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.propagate import Compared, energy
from tvm_qfp8.calibration.quantized import QuantizedProgram
from tvm_qfp8.calibration.sensitivity import decibel


def output_sqnr(
    mod: tvm.IRModule,
    plan: QuantizationPlan,
    samples: Sequence[Mapping[str, np.ndarray]],
    max_error: float = 1e-3,
    token_mask: str = "attention_mask",
) -> list[float | None]:
    """Signal to error of each output over the samples, in dB; of a softmax that of its input, None for integers.

    Parameters
    ----------
    mod : IRModule
        In canonical form.
    plan : QuantizationPlan
        Of ``calibrate``.
    samples : sequence of {input name: array}
        A few are enough.
    token_mask : str
        Name of an input that is nonzero where a token is valid: other rows of outputs do not count.
    """
    network = QuantizedProgram(mod, plan, max_error)
    pairs = [(*_both_outputs(network, sample), sample.get(token_mask)) for sample in samples]
    found: list[float | None] = []
    for index, first in enumerate(pairs[0][0]):
        signal = sum(energy([exact[index]], mask) for exact, _, mask in pairs)
        error = sum(energy([rounded[index] - exact[index]], mask) for exact, rounded, mask in pairs)
        found.append(decibel(signal, error) if first.dtype.kind == "f" else None)
    return found


def _both_outputs(
    network: QuantizedProgram, sample: Mapping[str, np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """In float32 and quantized; what no later step reads is let go."""
    steps, compared = network.program.steps, Compared(network.program)
    kept = compared.names | network.program.result_names()
    exact, rounded = dict(sample), dict(sample)
    with np.errstate(all="ignore"):
        for step in steps:
            exact[step.name], rounded[step.name] = step.run(exact), network.value(step, rounded)
            for name in network.program.last_reads[step.name]:
                if name not in kept:
                    del exact[name], rounded[name]
        return compared.of_outputs(exact), compared.of_outputs(rounded)
