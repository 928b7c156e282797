"""Convolutions that only scale channels are products, and join what comes before them."""

import pytest
import tvm
from test_canonicalize import check, random
from tvm import relax

from tvm_qfp8.relay_passes.fold_batchnorm import FoldBatchnorm
from tvm_qfp8.relay_passes.scale_channels import ScaleChannels

op = relax.op
NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
SHAPE = (2, 6, 5, 4)
BOTH = tvm.transform.Sequential([FoldBatchnorm(), ScaleChannels()])


def scaled(e, x, **options):
    """A BatchNorm as TensorFlow Lite writes it."""
    y = op.nn.conv2d(x, random(4, 1, 1, 1), groups=4, **NHWC, **options)
    return e(op.add(e(y), random(4)))


def test_it_folds_into_the_layer_before():
    def emit(e, x):
        y = e(op.add(e(op.nn.conv2d(x, random(4, 3, 3, 4), padding=1, **NHWC)), random(4)))
        return op.nn.relu(scaled(e, scaled(e, y)))

    check(emit, ["relax.nn.conv2d", "relax.add", "relax.nn.relu"], BOTH, SHAPE, rtol=1e-4)


def test_after_anything_else_it_is_a_product_and_a_sum():
    check(
        lambda e, x: op.nn.relu(scaled(e, e(op.abs(x)))),
        ["relax.abs", "relax.multiply", "relax.add", "relax.nn.relu"],
        BOTH,
        SHAPE,
    )


def test_where_both_versions_are_read_both_are_made():
    def emit(e, x):
        y = e(op.nn.conv2d(x, random(4, 1, 1, 4), **NHWC))
        return op.add(scaled(e, y), y)

    check(emit, ["relax.nn.conv2d", "relax.multiply", "relax.add", "relax.add"], BOTH, SHAPE, rtol=1e-4)


@pytest.mark.parametrize("options", [dict(strides=2), dict(padding=1), dict(groups=2), dict(outputs=8)])
def test_what_does_more_stays(options):
    outputs, groups = options.pop("outputs", 4), options.pop("groups", 4)

    def emit(_e, x):
        weight = random(outputs, 1, 1, 4 // groups)
        return op.nn.conv2d(x, weight, groups=groups, **NHWC, **options)

    check(emit, ["relax.nn.conv2d"], BOTH, SHAPE)
