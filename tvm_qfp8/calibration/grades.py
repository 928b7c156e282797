"""Which tensors get cheaper layouts than their best: those where they cost the outputs little for the time they save.

Linear grid values are bytes, of which an instruction multiplies twice as many as of int16 values with VNNI (x86), three
times as many with Arm's dot products, and somewhat more without. Layouts of three exponent bits take two products each
on tile registers and on tensor cores, those of two one. Weights that are bytes need no decoding there, and no sums in
blocks, at two products of bytes for any activation (``product_time``). Cheaper layouts have fewer steps where it
matters, though, and how much that costs differs from tensor to tensor by a factor of a thousand. So the error of each
activation and the weights that it meets, in their best layouts and in cheaper ones, is compared at the module's
outputs, all else in float32; tensors are taken in the order of error for each multiply-add, up to a budget, and none
where that makes up little of the network. Pixels that 1x1 convolutions read lose little in linear layouts by scales of
their own, and rotated (``row_scales``), which takes a pass. Where weights in bytes would save much of the time that is
left, they get a budget of their own. The choice does not look at the target: a module gives the same bits everywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from tvm_qfp8.calibration.choose_activation import ANY, BYTES, LINEAR, LINEAR_PIXELS, NARROW, Grade
from tvm_qfp8.calibration.losses import Comparison, macs_of
from tvm_qfp8.calibration.product_time import MACS, product_time
from tvm_qfp8.calibration.recurrent_layer import Recurrent

BYTE_LOSS_DB = 1.5
"""That cheaper layouts may cost of the outputs' signal to error (of a softmax the logits'), estimated by the sum of
what rounding each activation alone does to them."""

WORTH = 0.05
"""Of the multiply-adds' time that a decibel has to save, unless it was asked for: the last tensors that a budget buys
lose much for the little that they save."""

BARGAIN_LOSS_DB, BARGAIN = 3.0, 0.06
"""The same where a decibel saves more: of two convolutions with most of a network's multiply-adds, for example."""

WEIGHT_LOSS_DB = 1.5
"""The same of weights in bytes, of all estimated error, where they save ``WEIGHT_SHARE`` of a call's time."""

WEIGHT_SHARE = 0.15
"""Networks of few rows and long sums save more than this, MobileNetV2 less, which has more rows and shorter sums."""

ELEMENT_TIME = 0.03
"""Of what is written between the products, for each value, in the unit of ``product_time``: what is left of the times
of MobileNetV2, MiniLM and PP-OCR, 0.02 to 0.04."""

PASS_COST = 50
"""Of finding the scale of a pixel and encoding it, for each value, in multiply-adds of bytes with VNNI."""

SPARE_DB = 45.0
"""Of the outputs' signal to error, estimated: who has more loses nothing that anybody would notice by cheaper layouts,
and has a budget as if it were this. Signal is then what an output's values differ by, not their mean."""

LEAST_DB = 12.0
"""Unless asked to, outputs of more estimated error lose nothing: long chains of layers, as in language models, have
none to spare."""

LEAST_SHARE = 0.25
"""Of the multiply-adds of all layers that might be served, all in linear layouts: less is not worth any error."""


def within_budget(compared: Comparison, byte_loss_db: float | None) -> dict[str, Grade]:
    """The tensors that get cheaper layouts: those of least loss for each multiply-add that is saved.

    Parameters
    ----------
    compared : Comparison
    byte_loss_db : float or None
        As in ``Config``.
    """
    alone = noticed = compared.of_activations()
    if byte_loss_db is None:
        noticed = max(alone, compared.samples * compared.spread * 10 ** (-SPARE_DB / 10))
        offers = [(BYTE_LOSS_DB, WORTH), (BARGAIN_LOSS_DB, BARGAIN)]
        limit = compared.samples * 10 ** (-LEAST_DB / 10)
    else:
        offers, limit = [(byte_loss_db, 0.0)], math.inf
    chosen = {name: LINEAR for name in compared.readers if compared.loss(name, LINEAR) == 0}
    free = dict(chosen)
    total = sum(_cost(compared, name, ANY) for name in compared.readers)
    for loss_db, worth in offers:
        most = min(noticed * 10 ** (loss_db / 10), limit)
        budget = most - alone - sum(compared.loss(name, grade) for name, grade in chosen.items())
        dearest = noticed * math.log(10) / 10 / (worth * total) if worth * total else math.inf
        chosen = _bought(compared, chosen, budget, (NARROW, LINEAR_PIXELS, LINEAR), _cost, dearest)
    saved = sum(_cost(compared, name, ANY) - _cost(compared, name, grade) for name, grade in chosen.items())
    if saved < LEAST_SHARE * sum(map(macs_of, compared.readers.values())):
        chosen = free
    return chosen if byte_loss_db is not None else _with_weights_in_bytes(compared, chosen)


def _with_weights_in_bytes(compared: Comparison, chosen: dict[str, Grade]) -> dict[str, Grade]:
    """The same with more weights in bytes, if much of the time is decoding and adding up others."""
    error = compared.error(chosen)
    most = min(error * 10 ** (WEIGHT_LOSS_DB / 10), compared.samples * 10 ** (-LEAST_DB / 10))
    more = _bought(compared, chosen, most - error, (BYTES,), _time)
    now, then = (
        sum(_time(compared, name, grades.get(name, ANY)) for name in compared.readers)
        for grades in (chosen, more)
    )
    written = sum(math.prod(getattr(step.spec, "shape", ())) for step in compared.program.steps)
    if now - then < WEIGHT_SHARE * (now + ELEMENT_TIME * written):
        return chosen
    return _bought(compared, chosen, most - error, (BYTES, LINEAR), _time)


def _bought(
    compared: Comparison,
    chosen: Mapping[str, Grade],
    budget: float,
    grades: Sequence[Grade],
    cost: Callable[[Comparison, str, Grade], float],
    dearest: float = math.inf,
) -> dict[str, Grade]:
    """What is chosen, and what a budget of errors buys: what costs the least error for what it saves first.

    Nothing that costs more than ``dearest`` of error for what it saves.
    """
    bought = dict(chosen)

    def moves() -> Iterator[tuple[float, float, str, Grade]]:
        """What may come next: loss for what it saves, loss, tensor and grade."""
        for name, grade in itertools.product(compared.readers, grades):
            now = bought.get(name, ANY)
            saved = cost(compared, name, now) - cost(compared, name, grade)
            loss = compared.loss(name, grade) - compared.loss(name, now)
            if saved > 0 and loss <= min(budget, dearest * saved):  # never for what is infinite or no number
                yield loss / saved, loss, name, grade

    while budget > 0 and (possible := list(moves())):
        _, loss, name, grade = min(possible, key=lambda move: move[0])
        budget -= loss
        bought[name] = grade
    return bought


def _cost(compared: Comparison, name: str, grade: Grade) -> float:
    """Of the multiply-adds by the layouts alone."""
    best = compared.roundings[name, ANY].activation
    is_narrow = grade is ANY and best is not None and best.layout in NARROW.activations
    passes = PASS_COST * compared.sizes[name] if grade.by_pixel else 0
    return macs_of(compared.readers[name]) * (NARROW if is_narrow else grade).cost + passes


def _time(compared: Comparison, name: str, grade: Grade) -> float:
    """Of all that reads a variable; 0 where it is not rounded."""
    readers, rounding = compared.readers[name], compared.roundings.get((name, grade))
    if rounding is None:  # what is narrow anyway
        return _time(compared, name, ANY)
    if rounding.activation is None:
        return 0.0
    layout = rounding.activation.layout
    if isinstance(readers, Recurrent):
        return readers.macs / MACS * (1 if layout in LINEAR.activations else 2)
    passes = ELEMENT_TIME * compared.sizes[name] if grade.by_pixel else 0
    return passes + sum(
        product_time(linear, layout, rounding.weights[linear.step.name].layout)
        for linear in readers
        if linear.macs and not linear.is_depthwise
    )
