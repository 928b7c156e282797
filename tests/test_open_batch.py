"""An open batch: any number of samples without compiling again, each with the bits that it has alone."""

import numpy as np
import pytest
from models import cnn

import tvm_qfp8 as q
from tvm_qfp8.cli.options import parse_shapes
from tvm_qfp8.errors import InputError, ModelError

OPEN = {"image": ("batch", 3, 16, 16)}


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    compiled = q.compile(cnn(batch="batch"), input_shapes=OPEN, calibration={"image": images(8)})
    path = tmp_path_factory.mktemp("open") / "cnn.so"
    compiled.export_library(path)
    return q.load(path)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_samples_have_the_bits_that_they_have_alone(module, count):
    x = images(count, seed=1)
    (found,) = module.run({"image": x})
    assert found.shape == (count, 10)
    np.testing.assert_array_equal(found, np.concatenate([module.run({"image": one[None]})[0] for one in x]))


def test_no_sample_and_strided_samples(module):
    (found,) = module.run({"image": images(0)})
    assert found.shape == (0, 10) and found.dtype == np.float32
    x = images(6, seed=2)
    np.testing.assert_array_equal(module.run({"image": x[::2]})[0], module.run({"image": x[::2].copy()})[0])


@pytest.mark.parametrize(
    "array, message",
    [
        (images(2)[:, :, :8], r"shape \(1, 3, 8, 16\)"),
        (images(0)[:, :2], r"shape \(1, 2, 16, 16\)"),
        (images(2).astype(np.float64), "dtype float64"),
        (images(0).astype(np.float64), "dtype float64"),
        (np.float32(1), "shape"),
    ],
)
def test_wrong_arrays_are_named(module, array, message):
    with pytest.raises(InputError, match=message):
        module.run({"image": array})


@pytest.mark.parametrize("name", ["batch_size", "N"])
def test_a_file_that_opens_the_batch_only_needs_no_shapes(name):
    compiled = q.compile(cnn(batch=name), calibration={"image": images(8)})
    assert compiled.batch == name and any(repr(name) in note for note in compiled.report.notes)
    x = images(3, seed=1)
    np.testing.assert_array_equal(
        compiled.run({"image": x})[0], np.concatenate([compiled.run({"image": one[None]})[0] for one in x])
    )


def test_what_else_is_open_has_to_be_given():
    from models import encoder

    with pytest.raises(
        ModelError,
        match=r"'mask' .* \(n, m\); .* input_shapes=\{'ids': \(1, \[32, 64, 128\]\), .* ids=1,32/64/128",
    ):
        q.compile(encoder())
    with pytest.raises(ModelError, match="output 'y' has shape .*no batch in front"):
        q.compile(two_inputs(fixed=False))
    with pytest.raises(ModelError, match="'a' has open dimensions"):
        q.compile(two_inputs())


def test_what_cannot_stay_open_is_named():
    with pytest.raises(ModelError, match="only the first dimension"):
        q.compile(cnn(batch="batch"), input_shapes={"image": (1, 3, "height", 16)})
    shapes = {"a": ("n", 2), "b": ("m", 2)}
    with pytest.raises(ModelError, match="different batches: m, n"):
        q.compile(two_inputs(), input_shapes=shapes)
    with pytest.raises(ModelError, match="'b' has no open batch 'n'"):
        q.compile(two_inputs(), input_shapes={"a": ("n", 2)})
    with pytest.raises(ModelError, match="output 'y' has shape"):
        q.compile(two_inputs(), input_shapes={"a": ("n", 2), "b": ("n", 2)})


def two_inputs(fixed=True):
    from models import model
    from onnx import helper

    nodes = [
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["y"], perm=[1, 0]),
    ]
    return model(nodes, {"a": ("n", 2), "b": (1 if fixed else "n", 2)}, {"y": (2, "n")}, {})


def test_different_numbers_of_samples_are_named():
    from models import model
    from onnx import helper

    made = model(
        [helper.make_node("Add", ["a", "b"], ["y"])], {"a": ("n", 2), "b": ("n", 2)}, {"y": ("n", 2)}, {}
    )
    module = q.compile(made, input_shapes={"a": ("n", 2), "b": ("n", 2)})
    a = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(module.run({"a": a, "b": a})[0], a + a)
    with pytest.raises(InputError, match="3 in 'a', 2 in 'b'"):
        module.run({"a": a, "b": a[:2]})


def test_command_line_shapes():
    assert parse_shapes(["image=N,3,8,8"]) == {"image": ("N", 3, 8, 8)}
