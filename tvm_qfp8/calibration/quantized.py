"""NumPy evaluation of a module under a plan: the reference of what a compiled module computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.calibration.embeddings import embedding_steps
from tvm_qfp8.calibration.evaluate import Program, Step
from tvm_qfp8.calibration.linear import find_linear
from tvm_qfp8.calibration.plan import QuantizationPlan
from tvm_qfp8.calibration.tabulated import tabulated_steps


class QuantizedProgram:
    """A canonical module with its linear operators quantized and its functions as tables, in float32 arithmetic.

    Compiled kernels sum exact integers where this sums float32 products, so the two differ by float32
    rounding only (and by what the exponential inside a softmax may err).
    """

    def __init__(self, mod: tvm.IRModule, plan: QuantizationPlan, max_error: float = 1e-3) -> None:
        self.program, self.plan, self.max_error = Program(mod), plan, max_error
        self.tables = {
            **tabulated_steps(self.program, max_error),
            **embedding_steps(self.program, plan.embeddings),
        }
        found = find_linear(self.program)
        self.linear = {name: linear for name, linear in found.linear.items() if name in plan.linear}
        self.products = {name: product for name, product in found.products.items() if name in plan.products}
        self.recurrent = {name: layer for name, layer in found.recurrent.items() if name in plan.linear}
        self.weights = {name: plan.linear[name].weight.dequantize() for name in self.linear}

    def is_quantized(self, name: str) -> bool:
        """Whether a variable is a layer that the plan quantizes."""
        return (
            name in self.products
            or name in self.linear
            or name in self.recurrent
            or name in self.plan.embeddings
        )

    def value(self, step: Step, values: Mapping[str, Any]) -> Any:
        """What a step gives under the plan."""
        value = self._value(step, values)
        return self.plan.codes[step.name].rounded(value) if step.name in self.plan.codes else value

    def _value(self, step: Step, values: Mapping[str, Any]) -> Any:
        name = step.name
        if name in self.products:
            x, y = (values[source] for source in self.products[name].sources)
            return self.products[name].quantized_output(x, y, self.plan.products[name])
        if name in self.recurrent:
            layer, chosen = self.recurrent[name], self.plan.linear[name]
            return layer.quantized_outputs([values], chosen, self.max_error)[0]
        if name not in self.linear:
            return self.tables.get(name, step.run)(values)
        linear, chosen = self.linear[name], self.plan.linear[name]
        y = linear.quantized_output(values[linear.source], chosen, self.weights[name])
        return y if chosen.bias_correction is None else y - linear.per_channel(chosen.bias_correction)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Results for arrays given by input name."""
        values: dict[str, Any] = dict(inputs)
        with np.errstate(all="ignore"):
            for step in self.program.steps:
                values[step.name] = self.value(step, values)
        return self.program.outputs(values)


def evaluate_quantized(
    mod: tvm.IRModule, plan: QuantizationPlan, inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Run a canonical module once under a plan; for many inputs keep a ``QuantizedProgram``."""
    return QuantizedProgram(mod, plan).run(inputs)
