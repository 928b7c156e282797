"""The walk over a module that chooses layouts and corrects biases, layer after layer.

The module is walked once in binding order with two versions of every value, float32 and quantized flow,
over all samples: consecutive operators that stay float32 form a block, a linear operator stands alone. A
block reads its inputs from the spill, keeps inner values in memory for one sample at a time, writes what
later groups read and collects the statistics of what feeds a linear operator. A linear operator takes its
layout from these, and the mean difference of its two outputs is its bias correction, taken off before
anything later is computed: sequential, so that every layer is corrected for what it really receives. Done in
one shot, or after the activation function, the correction loses its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from tvm_qfp8.calibration.activations import Choice, Observer
from tvm_qfp8.calibration.calibrate_recurrent import calibrate_recurrent
from tvm_qfp8.calibration.choose_activation import ANY, ActivationChooser, Grade
from tvm_qfp8.calibration.embeddings import embedding_steps
from tvm_qfp8.calibration.evaluate import Program, Step
from tvm_qfp8.calibration.input_rows import InputRows
from tvm_qfp8.calibration.linear import (
    WEIGHTS,
    Linear,
    LinearSteps,
    Product,
    quantized_weight,
    read_only_by_linears,
)
from tvm_qfp8.calibration.output_error import OutputError
from tvm_qfp8.calibration.plan import ActivationQuantization, LinearQuantization, QuantizationPlan
from tvm_qfp8.calibration.recurrent_layer import Recurrent
from tvm_qfp8.calibration.rounding import can_round, rounded_on_data
from tvm_qfp8.calibration.rows import StoredRows
from tvm_qfp8.calibration.samples import Batches, samples_of
from tvm_qfp8.calibration.spill import Spill
from tvm_qfp8.calibration.tabulated import tabulated_steps
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.quantize import QTensor

Group = Linear | Product | Recurrent | list[Step]
_FLOAT, _QUANTIZED = "float32", "quantized"

ROW_SAMPLES = 32
"""Samples on which one scale for the tensor is compared with a scale for each row."""


class Walk:
    """State of the walk: what is spilled, where the two flows differ, what was chosen for which tensor."""

    def __init__(
        self,
        program: Program,
        found: LinearSteps,
        spill: Spill,
        plan: QuantizationPlan,
        *,
        chooser: ActivationChooser,
        token_mask: str,
        max_error: float,
        grades: Mapping[str, Grade] = MappingProxyType({}),
        sums: AbstractSet[str] = frozenset(),
    ) -> None:
        self.chooser, self.grades, self.sums = chooser, grades, sums
        self.program, self.spill, self.plan = program, spill, plan
        self.token_mask = token_mask
        self.max_error = max_error
        self.alone: dict[str, Linear | Product | Recurrent] = {
            **found.linear,
            **found.products,
            **found.recurrent,
        }
        self.sources = {linear.source for linear in found.linear.values()}
        self.sources.update(source for product in found.products.values() for source in product.sources)
        self.nearest: dict[tuple[str, tuple[str, ...]], QTensor] = {}  # of weights that several layers have
        self.readers = read_only_by_linears(found)
        self.tables = {
            **tabulated_steps(program, max_error),
            **embedding_steps(program, plan.embeddings),
        }
        self.steps = self._needed_steps()
        self.last_reader = {name: step.name for step in self.steps for name in step.reads}
        self.samples = 0
        self.differs: set[str] = set()  # values that are not the same in both flows
        self.corrections: dict[str, np.ndarray] = {}
        self.observers: dict[str, Observer] = {}
        self.choices: dict[str, Choice] = {}
        self.shared_rows: tuple[str, InputRows] | None = None

    def _needed_steps(self) -> list[Step]:
        """Steps that some quantized operator depends on, in binding order."""
        needed: set[str] = set()
        steps = []
        for step in reversed(self.program.steps):
            if step.name in self.alone or step.name in needed:
                needed.update(step.reads)
                steps.append(step)
        return steps[::-1]

    def groups(self) -> Iterator[Group]:
        """The walk: quantized operators one by one and the blocks of steps between them."""
        block: list[Step] = []
        for step in self.steps:
            if step.name not in self.alone:
                block.append(step)
                continue
            if block:
                yield block
            block = []
            yield self.alone[step.name]

    def run(self, done: Callable[[], None]) -> None:
        """All groups in order; ``done`` is called after each linear operator."""
        for group in self.groups():
            if isinstance(group, Linear):
                self.run_linear(group)
                done()
            elif isinstance(group, Product):
                self.run_product(group)
            elif isinstance(group, Recurrent):
                self.run_recurrent(group)
                done()
            else:
                self.run_block(group)
            self.free_dead(group)

    def spill_inputs(self, batches: Batches) -> int:
        """Consume the samples; returns how many there were."""
        kept = [name for name in self.program.inputs if name in self.last_reader or name == self.token_mask]
        for name in kept:
            self.spill.create(name, _FLOAT, self.program.inputs[name])
        for sample in samples_of(batches, self.program.inputs):
            for name in kept:
                self.spill.write(name, _FLOAT, self.samples, sample[name])
            self.samples += 1
        if not self.samples:
            raise CalibrationError(
                "found no calibration samples; give at least one, or None to quantize what needs no data"
            )
        return self.samples

    def _flow(self, name: str) -> str:
        return _QUANTIZED if name in self.differs else _FLOAT

    def _read(self, name: str, flow: str, sample: int) -> Any:
        value = self.spill.read(name, flow, sample)
        if flow == _QUANTIZED and name in self.corrections:
            value -= self.corrections[name]
        if flow == _QUANTIZED and name in self.plan.codes:
            value = self.plan.codes[name].rounded(value)
        return value

    def _tokens(self, rows: int, sample: int) -> np.ndarray | None:
        """Which rows are valid tokens, if the module has a token mask with one element for each row."""
        if not self.spill.has(self.token_mask, _FLOAT):
            return None
        mask = self.spill.read(self.token_mask, _FLOAT, sample).reshape(-1) != 0
        return mask if mask.size == rows and mask.any() else None

    def _record(self, name: str, value: np.ndarray, sample: int) -> None:
        if name not in self.observers:
            self.observers[name] = Observer()
        rows = value.size // value.shape[-1] if value.ndim else 1
        self.observers[name].record(value, self._tokens(rows, sample))

    def run_block(self, steps: list[Step]) -> None:
        """Evaluate steps in both flows; what only depends on equal values is computed once."""
        inner = {step.name for step in steps}
        reads = {name for step in steps for name in step.reads} - inner
        for step in steps:
            if step.name in self.tables or self.differs.intersection(step.reads):
                self.differs.add(step.name)
        kept = [step for step in steps if self.last_reader.get(step.name, step.name) not in inner]
        for step in kept:
            for flow in {_FLOAT, self._flow(step.name)}:
                self.spill.create(step.name, flow, step.spec)
        for sample in range(self.samples):
            exact = {name: self._read(name, _FLOAT, sample) for name in reads}
            rounded = {name: self._read(name, _QUANTIZED, sample) for name in reads & self.differs}
            rounded = {**exact, **rounded}
            for step in steps:
                exact[step.name] = step.run(exact)
                lowered = self.tables.get(step.name, step.run)
                rounded[step.name] = lowered(rounded) if step.name in self.differs else exact[step.name]
            for step in kept:
                self.spill.write(step.name, _FLOAT, sample, exact[step.name])
                if step.name in self.differs:
                    self.spill.write(step.name, _QUANTIZED, sample, rounded[step.name])
                if step.name in self.sources:
                    self._record(step.name, rounded[step.name], sample)

    def _choice(self, name: str) -> Choice:
        """Layout and scale of a tensor, the same for all that read it."""
        if name not in self.choices:
            if name not in self.observers:  # a module input or another quantized operator's result
                for sample in range(self.samples):
                    self._record(name, self._read(name, self._flow(name), sample), sample)
            choice = self.chooser.choose(
                self.observers.pop(name),
                self.readers.get(name, []),
                StoredRows(partial(self._rows, name), min(self.samples, ROW_SAMPLES)),
                self.grades.get(name, ANY),
            )
            self.choices[name], activation = choice, choice.activation
            kept = name in self.sums and name in self.differs
            if kept and activation is not None and activation.has_one_scale:
                self.plan.codes[name] = activation
        return self.choices[name]

    def _rows(self, name: str, sample: int) -> np.ndarray:
        """The rows of valid tokens of what layers receive."""
        value = self._read(name, self._flow(name), sample)
        rows = value.reshape(-1, value.shape[-1])
        tokens = self._tokens(len(rows), sample)
        return rows if tokens is None else rows[tokens]

    def _result(self, step: Step) -> bool:
        """Make room for both versions of a quantized operator's result, if anything reads it."""
        self.differs.add(step.name)
        if step.name not in self.last_reader:
            return False
        for flow in (_FLOAT, _QUANTIZED):
            self.spill.create(step.name, flow, step.spec)
        return True

    def run_linear(self, linear: Linear) -> None:
        """Quantize one linear operator, measure its bias correction and put it into the plan."""
        name, source = linear.step.name, linear.source
        choice = self._choice(source)
        meets = linear if choice.activation is None else linear.meeting(choice.activation)
        layouts = WEIGHTS if linear.is_depthwise else self.grades.get(source, ANY).weights
        if linear.shares:
            same = linear.shares, layouts
            if same not in self.nearest:
                found = quantized_weight(linear, layouts)
                self.nearest[same] = self.nearest.setdefault((linear.shares, (found.layout,)), found)
            codes = self.nearest[same]
        elif can_round(linear):
            nearest = [quantized_weight(meets, (layout,)) for layout in layouts]
            codes = rounded_on_data(meets, nearest, self._input_rows(meets, choice.activation))
        else:
            codes = quantized_weight(meets, layouts)
        chosen = LinearQuantization(codes, choice.activation, note=choice.note, received=choice.distribution)
        weight = chosen.weight.dequantize()
        by_rows = choice.activation is not None and choice.activation.by_rows
        kept, error = self._result(linear.step), OutputError(linear, relative=by_rows)
        for sample in range(self.samples):
            x = self._read(source, _FLOAT, sample)
            exact = linear.output(x, linear.weight)
            if source in self.differs:
                x = self._read(source, _QUANTIZED, sample)
            rounded = linear.quantized_output(x, chosen, weight)
            if kept:
                self.spill.write(name, _FLOAT, sample, exact)
                self.spill.write(name, _QUANTIZED, sample, rounded)
            error.add(exact, rounded, self._tokens(exact.size // exact.shape[linear.channel_axis], sample))
        correction = error.correction()
        self.corrections[name] = linear.per_channel(correction)
        self.plan.linear[name] = replace(chosen, bias_correction=correction, sqnr_db=error.sqnr_db())

    def _input_rows(self, linear: Linear, activation: ActivationQuantization | None) -> InputRows:
        """What the layer reads, in both flows; dense layers that read one tensor share it."""
        is_dense = linear.step.operator == "relax.matmul"
        if is_dense and self.shared_rows is not None and self.shared_rows[0] == linear.source:
            return self.shared_rows[1]
        rows = InputRows(linear, self.samples, activation)
        for sample in range(self.samples):
            exact = self._read(linear.source, _FLOAT, sample)
            received = (
                exact if linear.source not in self.differs else self._read(linear.source, _QUANTIZED, sample)
            )
            tokens = self._tokens(exact.size // exact.shape[-1], sample)
            rows.add(received, exact, tokens)
        self.shared_rows = (linear.source, rows) if is_dense else None
        return rows

    def run_product(self, product: Product) -> None:
        """Quantize a product of two activations; it has no bias, so nothing is corrected."""
        name, sources = product.step.name, product.sources
        choices = [self._choice(source) for source in sources]
        first, second = (choice.activation for choice in choices)
        if first is None or second is None:
            self.plan.skipped[name] = choices[0].note or choices[1].note
            self.run_block([product.step])
            return
        assert (
            first.scale is not None and second.scale is not None
        )  # only dense layers' inputs have row scales
        chosen = first, second
        self.plan.products[name] = chosen
        if not self._result(product.step):
            return
        for sample in range(self.samples):
            x, y = (self._read(source, _FLOAT, sample) for source in sources)
            self.spill.write(name, _FLOAT, sample, product.output(x, y))
            x, y = (self._read(source, self._flow(source), sample) for source in sources)
            self.spill.write(name, _QUANTIZED, sample, product.quantized_output(x, y, chosen))

    def run_recurrent(self, layer: Recurrent) -> None:
        """Quantize the product with a recurrent layer's hidden state."""
        step = layer.step
        kept = self._result(step)

        def exact(sample: int) -> dict[str, Any]:
            return {name: self._read(name, _FLOAT, sample) for name in step.reads}

        def rounded(sample: int) -> dict[str, Any]:
            return {name: self._read(name, self._flow(name), sample) for name in step.reads}

        def write(flow: str, sample: int, result: tuple) -> None:
            if kept:
                self.spill.write(step.name, flow, sample, result)

        self.plan.linear[step.name] = calibrate_recurrent(
            layer,
            exact,
            rounded,
            self.samples,
            self.chooser,
            self.max_error,
            write,
            self.grades.get(step.name, ANY),
        )

    def free_dead(self, group: Group) -> None:
        """Delete spilled values that nothing after this group reads."""
        done = {step.name for step in group} if isinstance(group, list) else {group.step.name}
        for name, reader in self.last_reader.items():
            if reader in done and name != self.token_mask:
                for flow in (_FLOAT, _QUANTIZED):
                    if self.spill.has(name, flow):
                        self.spill.free(name, flow)
