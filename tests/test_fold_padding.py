"""Padding operators become the padding of the windows that read them, and the numbers stay."""

import numpy as np
import pytest
from test_canonicalize import build, check, random
from tvm import relax

from tvm_qfp8.relay_passes.fold_padding import FoldPadding

op = relax.op
W, W1 = random(6, 3, 3, 3), random(6, 3, 3)
SAME = [0, 0, 0, 0, 0, 1, 0, 1]
LOWEST = float(np.finfo(np.float32).min)

TAKEN = {
    "convolution": (lambda e, x: op.nn.conv2d(e(op.nn.pad(x, SAME)), W, strides=(2, 2)), "relax.nn.conv2d"),
    "convolution with padding of its own": (
        lambda e, x: op.nn.conv2d(e(op.nn.pad(x, SAME)), W, padding=(1, 2, 0, 1)),
        "relax.nn.conv2d",
    ),
    "average": (lambda e, x: op.nn.avg_pool2d(e(op.nn.pad(x, SAME)), (2, 2), (2, 2)), "relax.nn.avg_pool2d"),
    "maximum": (
        lambda e, x: op.nn.max_pool2d(e(op.nn.pad(x, SAME, pad_value=-np.inf)), (3, 3), (2, 2)),
        "relax.nn.max_pool2d",
    ),
    "maximum over the lowest number": (
        lambda e, x: op.nn.max_pool2d(e(op.nn.pad(x, SAME, pad_value=LOWEST)), (3, 3), (2, 2)),
        "relax.nn.max_pool2d",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_padding_is_taken_in(name):
    emit, expected = TAKEN[name]
    check(emit, [expected], FoldPadding(), (2, 3, 6, 7), rtol=1e-5)


def test_of_one_dimension():
    def emit(e, x):
        return op.nn.conv1d(e(op.nn.pad(x, [0, 0, 0, 0, 2, 0])), W1)

    after = FoldPadding()(build(emit, (2, 3, 9)))  # a causal convolution
    (call,) = [b.value for b in after["main"].body.blocks[0].bindings if isinstance(b.value, relax.Call)]
    assert [int(width) for width in call.attrs.padding] == [2, 0]


def test_a_maximum_takes_zeros_where_nothing_is_negative():
    def emit(e, x):
        return op.nn.max_pool2d(e(op.nn.pad(e(op.nn.relu(x)), SAME)), (3, 3), (2, 2))

    check(emit, ["relax.nn.relu", "relax.nn.max_pool2d"], FoldPadding(), (2, 3, 6, 7))


STAYS = {
    "zeros under a maximum": lambda e, x: op.nn.max_pool2d(e(op.nn.pad(x, SAME)), (3, 3)),
    "an average that leaves its own padding out": lambda e, x: op.nn.avg_pool2d(
        e(op.nn.pad(x, SAME)), (3, 3), padding=(1, 1)
    ),
    "windows of padding alone": lambda e, x: op.nn.avg_pool2d(
        e(op.nn.pad(x, [0, 0, 0, 0, 2, 2, 0, 0])), (2, 2)
    ),
    "channels": lambda e, x: op.nn.max_pool2d(
        e(op.nn.pad(x, [0, 0, 1, 1, 0, 0, 0, 0], pad_value=-np.inf)), (3, 3)
    ),
    "reflections": lambda e, x: op.nn.conv2d(e(op.nn.pad(x, SAME, pad_mode="reflect")), W),
    "ones": lambda e, x: op.nn.conv2d(e(op.nn.pad(x, SAME, pad_value=1.0)), W),
    "cuts": lambda e, x: op.nn.conv2d(e(op.nn.pad(x, [0, 0, 0, 0, -1, 1, 0, 0])), W),
}


@pytest.mark.parametrize("name", STAYS)
def test_padding_that_is_something_else_stays(name):
    after = FoldPadding()(build(STAYS[name], (2, 3, 6, 7)))
    names = [
        str(b.value.op.name) for b in after["main"].body.blocks[0].bindings if isinstance(b.value, relax.Call)
    ]
    assert names[0] == "relax.nn.pad"
