"""Convolutions of one input that are added become one, and the numbers stay."""

import pytest
from test_canonicalize import check, const, random
from tvm import relax

from tvm_qfp8.relay_passes.join_branches import JoinBranches

op = relax.op
NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
SHAPE = (1, 6, 7, 4)


def convolution(e, x, kernel, padding=0, groups=1, outputs=4, **options):
    y = op.nn.conv2d(
        x, random(outputs, *kernel, 4 // groups), padding=padding, groups=groups, **NHWC, **options
    )
    return e(op.add(e(y), random(outputs)))


def test_what_else_is_added_stays():
    def emit(e, x):
        both = e(op.add(convolution(e, x, (3, 3), 1), e(op.multiply(x, random(4)))))
        return op.add(both, convolution(e, x, (1, 1)))

    expected = ["relax.multiply", "relax.nn.conv2d", "relax.add", "relax.add"]
    check(emit, expected, JoinBranches(), SHAPE, rtol=1e-5)


def test_strides_and_windows_of_every_size():
    def emit(e, x):
        parts = [
            convolution(e, x, (5, 3), (2, 1), strides=2),
            convolution(e, x, (1, 3), (0, 1), strides=2),
            convolution(e, x, (1, 1), strides=2),
        ]
        return op.add(e(op.add(parts[0], parts[1])), parts[2])

    check(emit, ["relax.nn.conv2d", "relax.add"], JoinBranches(), SHAPE, rtol=1e-5)


APART = {
    "a residual connection": lambda e, x: op.add(convolution(e, x, (3, 3), 1), x),
    "a weighted residual connection": lambda e, x: op.add(
        convolution(e, x, (3, 3), 1), e(op.multiply(x, const(0.2)))
    ),
    "windows of which neither covers the other": lambda e, x: op.add(
        convolution(e, x, (3, 1), (1, 0)), convolution(e, x, (1, 3), (0, 1))
    ),
    "other inputs": lambda e, x: op.add(
        convolution(e, x, (3, 3), 1), convolution(e, e(op.nn.relu(x)), (1, 1))
    ),
    "other groups": lambda e, x: op.add(convolution(e, x, (3, 3), 1), convolution(e, x, (1, 1), groups=4)),
    "other dilations": lambda e, x: op.add(
        convolution(e, x, (3, 3), 2, dilation=2), convolution(e, x, (3, 3), 1)
    ),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_two_branches(groups):
    def emit(e, x):
        return op.add(convolution(e, x, (3, 3), 1, groups), convolution(e, x, (1, 1), 0, groups))

    check(emit, ["relax.nn.conv2d", "relax.add"], JoinBranches(), SHAPE, rtol=1e-5)


@pytest.mark.parametrize("name", APART)
def test_what_does_not_fit_stays_apart(name):
    emit = APART[name]
    convolutions = 1 if "residual" in name else 2
    scales = ["relax.multiply"] * ("weighted" in name)
    relus = ["relax.nn.relu"] * (name == "other inputs")
    expected = [
        "relax.nn.conv2d",
        "relax.add",
        *relus,
        *["relax.nn.conv2d", "relax.add"] * (convolutions - 1),
    ]
    check(emit, [*expected, *scales, "relax.add"], JoinBranches(), SHAPE, rtol=1e-5)


def test_a_convolution_that_is_read_elsewhere_stays():
    def emit(e, x):
        first = convolution(e, x, (3, 3), 1)
        both = e(op.add(first, convolution(e, x, (1, 1))))
        return op.multiply(both, e(op.nn.relu(first)))

    check(
        emit,
        ["relax.nn.conv2d", "relax.add"] * 2 + ["relax.add", "relax.nn.relu", "relax.multiply"],
        JoinBranches(),
        SHAPE,
        rtol=1e-5,
    )
