"""Which layer is to blame, and max_drop: a network with one layer that quantization ruins."""

import numpy as np
import pytest
from models import cnn, images
from onnx import helper, numpy_helper

import tvm_qfp8 as q
from tvm_qfp8.calibration import calibrate, layer_effects
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.propagate import values_with
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.prepare import prepare


def fragile():
    """``cnn`` with logits that are the small difference of two large products: the Gemm has no bits left for it."""
    made = cnn()
    graph = made.graph
    weights = next(tensor for tensor in graph.initializer if tensor.name == "w4")
    values = numpy_helper.to_array(weights)
    # Twin features of opposite sign and a thousand times the weight cancel.
    wide = np.concatenate([values + 300, np.full_like(values, -300)], 1).astype(np.float32)
    graph.initializer.remove(weights)
    graph.initializer.append(numpy_helper.from_array(wide, "w4"))
    at = next(i for i, node in enumerate(graph.node) if node.op_type == "Gemm")
    graph.node[at].input[0] = "twice"
    graph.node.insert(at, helper.make_node("Concat", ["f", "f"], ["twice"], axis=1))
    return made


def score(run) -> float:
    """Mean of the largest probability."""
    return float(np.mean([run(sample)[0].max() for sample in images(6, seed=3)]))


def closeness(reference):
    """1 less the mean error of the probabilities."""
    expected = [reference(sample)[0] for sample in images(6, seed=5)]
    return lambda run: float(
        np.mean([1 - np.abs(run(s)[0] - e).mean() for s, e in zip(images(6, seed=5), expected, strict=True)])
    )


def test_the_harmful_layer_comes_first():
    canonical = prepare(load_model(fragile()).mod)
    plan = calibrate(canonical, images(8))
    effects = layer_effects(canonical, plan, images(2, seed=1))
    assert len(effects) == len(plan.linear)
    assert effects[0].operator == "matmul"
    assert effects[0].output_sqnr_db < effects[1].output_sqnr_db
    assert [e.output_sqnr_db for e in effects] == sorted(e.output_sqnr_db for e in effects)


def test_a_change_reaches_what_follows_and_the_rest_is_given_up():
    program = Program(prepare(load_model(cnn()).mod))
    (sample,) = images(1)
    values = dict(sample)
    for step in program.steps:
        values[step.name] = step.run(values)
    first, last = program.steps[0], program.steps[-1]
    again = dict(sample)
    for step in program.steps:
        again[step.name] = values[first.name] + 1 if step is first else step.run(again)
    seen = values_with(
        program, {first.name: lambda _step, _seen: values[first.name] + 1}, values, {last.name}
    )
    assert np.array_equal(seen[last.name], again[last.name])
    assert not np.array_equal(seen[last.name], values[last.name])
    assert seen[first.name] is values[first.name]  # the changed one was given up


def test_max_drop_leaves_the_harmful_layer_in_float32():
    from tvm_qfp8.calibration import evaluate

    made = fragile()
    canonical = prepare(load_model(made).mod)
    metric = closeness(lambda sample: evaluate(canonical, sample))
    drop = 100 * (1 - metric(q.compile(made, calibration=images(8)).run))
    kept = q.compile(made, calibration=images(8), max_drop=drop / 2, metric=metric)
    blamed = [layer for layer in kept.report.layers if "max_drop" in layer.reason]
    assert [layer.operator for layer in blamed] == ["matmul"]
    assert 100 * (1 - metric(kept.run)) <= drop / 2


def linear_layouts(**config):
    report = q.compile(cnn(), calibration=images(8), config=q.Config(**config)).report
    return sum((layer.activation_layout or "")[:4] in ("E1M6", "UE1M") for layer in report.layers)


def test_decibels_buy_linear_layouts():
    assert linear_layouts(byte_loss_db=0.0) < linear_layouts(byte_loss_db=40.0)
    assert linear_layouts(byte_loss_db=0.0) <= linear_layouts() <= linear_layouts(byte_loss_db=40.0)
    with pytest.raises(CalibrationError, match="give decibels from 0"):
        linear_layouts(byte_loss_db=-1.0)


def test_nothing_is_left_in_float32_without_need():
    kept = q.compile(cnn(), calibration=images(8), max_drop=50.0, metric=score)
    assert not any("max_drop" in layer.reason for layer in kept.report.layers)


def test_wider_layouts_come_before_float32():
    """A score that only the module without costly linear layouts keeps, from samples that can be read once."""
    seen = []

    def metric(run):
        seen.append(run)
        return 1.0 if len(seen) in (1, 3) else 0.0  # float32, as compiled, wider

    kept = q.compile(cnn(), calibration=iter(images(8)), max_drop=1.0, metric=metric)
    assert len(seen) == 3 and "linear layouts only where" in str(kept.report)
    assert not any("max_drop" in layer.reason for layer in kept.report.layers)


def test_mistakes_are_named():
    with pytest.raises(CalibrationError, match="belong together"):
        q.compile(cnn(), calibration=images(2), max_drop=1.0)
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        q.compile(cnn(), max_drop=1.0, metric=score)
    with pytest.raises(CalibrationError, match="metric gave nan"):
        q.compile(cnn(), calibration=images(2), max_drop=1.0, metric=lambda run: float("nan"))
    with pytest.raises(CalibrationError, match="even with all"):
        scores = iter([1.0, *[0.0] * 20])
        q.compile(cnn(), calibration=images(2), max_drop=1.0, metric=lambda run: next(scores))
