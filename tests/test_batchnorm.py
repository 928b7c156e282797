"""BatchNorm statistics of imported graphs, estimated anew with quantized tensors flowing."""

import numpy as np
import onnx
import pytest
from models import cnn, images, model
from onnx import helper, numpy_helper

import tvm_qfp8 as q
from tvm_qfp8.calibration import Program, QuantizedProgram, calibrate, evaluate
from tvm_qfp8.calibration.evaluate import TensorSpec
from tvm_qfp8.calibration.recalibration import LEAST_IMAGES, Recalibration
from tvm_qfp8.calibration.stored_samples import StoredSamples
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.batchnorm_marks import find_batchnorms, mark_batchnorms, with_statistics
from tvm_qfp8.relay_passes.prepare import prepare

BATCH, CHANNELS = 8, (16, 16, 8)


def network() -> onnx.ModelProto:
    """Three convolutions with BatchNorm that has the statistics of ``samples``, and SiLU."""
    rng = np.random.default_rng(0)
    nodes, constants, x, inputs = [], {}, "image", 3
    for i, outputs in enumerate(CHANNELS):
        names = [f"{name}{i}" for name in ("gamma", "beta", "mean", "var")]
        constants[f"w{i}"] = rng.normal(size=(outputs, inputs, 3, 3), scale=0.2).astype(np.float32)
        for name, value in zip(names, (1.0, 0.1, 0.0, 1.0), strict=True):
            constants[name] = np.full(outputs, value, np.float32)
        nodes.append(helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"]))
        nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *names], [f"n{i}"], epsilon=1e-5))
        nodes.append(helper.make_node("Sigmoid", [f"n{i}"], [f"s{i}"]))
        nodes.append(helper.make_node("Mul", [f"n{i}", f"s{i}"], [f"y{i}"]))
        x, inputs = f"y{i}", outputs
    shape = (BATCH, CHANNELS[-1], 6, 6)
    made = model(nodes, {"image": (BATCH, 3, 12, 12)}, {x: shape}, constants)
    found, _ = q.recalibrate_batchnorm(made, samples())  # what training would have left
    fitted = {}
    for i, layer in enumerate(find_batchnorms(found)):
        fitted |= {f"mean{i}": layer.mean, f"var{i}": layer.variance}
    return changed(made, lambda name, array: fitted.get(name, array))


def changed(made: onnx.ModelProto, change) -> onnx.ModelProto:
    """A copy with other constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    for tensor in copy.graph.initializer:
        array = np.asarray(change(tensor.name, numpy_helper.to_array(tensor)), np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def harmed(made: onnx.ModelProto) -> onnx.ModelProto:
    """Weights on nine levels a tensor."""

    def round_coarsely(name, array):
        step = np.abs(array).max() / 4
        return np.rint(array / step) * step if name.startswith("w") else array

    return changed(made, round_coarsely)


def samples(count: int = LEAST_IMAGES // BATCH, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"image": (rng.normal(size=(BATCH, 3, 12, 12)) + 0.5).astype(np.float32)}


@pytest.fixture(scope="module")
def trained() -> onnx.ModelProto:
    return network()


def quantized(found):
    """``run`` of a model quantized on ``samples``, by NumPy."""
    canonical = prepare(load_model(found).mod)
    return QuantizedProgram(canonical, calibrate(canonical, samples())).run


def exact(found):
    """``run`` in float32."""
    canonical = prepare(load_model(found).mod)
    return lambda inputs: evaluate(canonical, inputs)


def error(run, reference) -> float:
    return float(np.mean([np.square(run(x)[0] - reference(x)[0]).mean() for x in samples(4, seed=1)]))


def test_the_output_of_a_harmed_network_gets_better(trained):
    bad = harmed(trained)
    mod, done = q.recalibrate_batchnorm(bad, samples())
    assert done.taken >= 2 and done.layers == 3 and done.batches == 24
    assert done.after > done.before
    assert error(quantized(mod), exact(trained)) < 0.9 * error(quantized(bad), exact(trained))


def test_compile_does_the_same_and_the_report_says_so(trained):
    bad = harmed(trained)
    mod, done = q.recalibrate_batchnorm(bad, samples())
    config = q.Config(recalibrate_batchnorm=True)
    module = q.compile(bad, calibration=samples(), config=config)
    assert str(done) in module.report.notes
    assert error(module.run, quantized(mod)) < 0.02 * error(module.run, quantized(bad))


def test_a_healthy_network_keeps_its_statistics(trained):
    mod, done = q.recalibrate_batchnorm(trained, samples(seed=3))
    assert done.kept_old and str(done).startswith("kept the old statistics of 3 BatchNorm layers")
    for old, new in zip(find_batchnorms(load_model(trained).mod), find_batchnorms(mod), strict=True):
        assert (old.mean == new.mean).all() and (old.variance == new.variance).all()


def test_first_layer_gets_the_mean_and_variance_of_what_it_receives(trained):
    bad = changed(trained, lambda name, array: array + 1 if name == "mean0" else array)
    mod, done = q.recalibrate_batchnorm(bad, samples())
    assert done.taken >= 1
    first = find_batchnorms(mod)[0]
    fitted = find_batchnorms(load_model(trained).mod)[0]  # of the same samples
    np.testing.assert_allclose(first.mean, fitted.mean, atol=1e-3)
    np.testing.assert_allclose(first.variance, fitted.variance, rtol=1e-2)


def test_few_images_are_refused_unless_a_metric_judges(trained):
    bad, reference = harmed(trained), exact(trained)
    mod, done = q.recalibrate_batchnorm(bad, samples(4))
    assert done.kept_old and "32 images are too few" in str(done)

    def closeness(run) -> float:
        return -error(run, reference)

    _, done = q.recalibrate_batchnorm(bad, samples(4), metric=closeness)
    assert done.taken and done.after > done.before
    mod, done = q.recalibrate_batchnorm(bad, samples(4), metric=lambda run: -closeness(run))
    assert done.kept_old and done.after < done.before
    assert (find_batchnorms(mod)[0].mean == find_batchnorms(load_model(bad).mod)[0].mean).all()


def test_mark_passes_its_input_on_and_moves_with_the_layout(trained):
    mod = load_model(trained).mod
    marked = prepare(mark_batchnorms(mod))
    marks = [step for step in Program(marked).steps if step.operator == "relax.qfp8.batchnorm_input"]
    assert [mark.arguments[1:] for mark in marks] == [(0, 3), (1, 3), (2, 3)]
    (x,) = samples(1)
    np.testing.assert_allclose(evaluate(marked, x)[0], evaluate(prepare(mod), x)[0], atol=2e-5)


def test_other_statistics_leave_the_rest_alone(trained):
    mod = load_model(trained).mod
    first, second, third = find_batchnorms(mod)
    found = find_batchnorms(with_statistics(mod, {1: first}))
    assert (found[1].mean == first.mean).all() and (found[2].mean == third.mean).all()
    assert not (second.mean == first.mean).all()


def test_stored_samples_are_read_again_and_deleted(tmp_path):
    given = images(3)
    inputs = {"image": TensorSpec((1, 3, 16, 16), "float32")}
    with StoredSamples(iter(given), inputs, str(tmp_path)) as stored:
        for _ in range(2):
            assert [(x["image"] == y["image"]).all() for x, y in zip(stored, given, strict=True)] == [
                True
            ] * 3
        assert len(stored) == 3 and any(tmp_path.iterdir())
    assert not any(tmp_path.iterdir())
    with pytest.raises(CalibrationError, match="misses input"):
        StoredSamples([{"other": given[0]["image"]}], inputs, str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_errors_say_what_to_do(trained):
    nodes = [helper.make_node("Relu", ["image"], ["y"])]
    plain = model(nodes, {"image": (1, 3)}, {"y": (1, 3)}, {})
    with pytest.raises(CalibrationError, match="no BatchNorm layer"):
        q.recalibrate_batchnorm(plain, [{"image": np.zeros((1, 3), np.float32)}])
    with pytest.raises(CalibrationError, match="give some"):
        q.compile(cnn(), config=q.Config(recalibrate_batchnorm=True))
    with pytest.raises(CalibrationError, match="found no calibration samples"):
        q.recalibrate_batchnorm(trained, [])


def test_record_in_words():
    done = Recalibration(2, 3, 24, -1.0, -0.5)
    assert str(done) == (
        "took new statistics of 2 of 3 BatchNorm layers, from 24 batches: score -1 with the old, -0.5 with the new"
    )


def test_layers_on_the_input_and_behind_dense_layers():
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "dense": rng.normal(size=(36 * 4, 16)).astype(np.float32),
    }
    nodes = [
        helper.make_node("BatchNormalization", ["image", *_statistics(constants, "first", 3)], ["n"]),
        helper.make_node("Conv", ["n", "w"], ["c"]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "dense"], ["g"]),
        helper.make_node("BatchNormalization", ["g", *_statistics(constants, "last", 16)], ["y"]),
    ]
    made = model(nodes, {"image": (64, 3, 8, 8)}, {"y": (64, 16)}, constants)
    given = [{"image": rng.normal(size=(64, 3, 8, 8)).astype(np.float32) * 3 + 2} for _ in range(4)]
    mod, done = q.recalibrate_batchnorm(made, given)
    assert (done.taken, done.layers) == (2, 2)
    first, last = find_batchnorms(mod)
    fitted = np.concatenate([x["image"] for x in given[:3]])
    np.testing.assert_allclose(first.mean, fitted.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(first.variance, fitted.var(axis=(0, 2, 3), ddof=1), rtol=1e-5)
    (result,) = zip(*(evaluate(prepare(mod), x) for x in given[:3]), strict=True)
    np.testing.assert_allclose(
        np.concatenate(result).mean(axis=0), 0, atol=0.05
    )  # normalized by quantized values
    np.testing.assert_allclose(np.concatenate(result).var(axis=0), 1, atol=0.1)
    assert last.mean.shape == (16,)


def _statistics(constants, name, channels) -> list[str]:
    """Names of gamma, beta, mean and variance that normalize nothing."""
    names = [f"{name}_{part}" for part in ("gamma", "beta", "mean", "var")]
    for key, value in zip(names, (1.0, 0.0, 0.0, 1.0), strict=True):
        constants[key] = np.full(channels, value, np.float32)
    return names
