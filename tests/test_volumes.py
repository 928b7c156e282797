"""3-D convolutions and what surrounds them become 2-D ones over frames."""

import numpy as np
import onnx
import onnx.reference
import pytest
import tvm
from relax_programs import build, constant, random
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8 as q
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.relay_passes.volumes_as_frames import VolumesAsFrames

C = 6


def conv(emit, x, outputs=C, kernel=(3, 3, 3), **how):
    weight = constant(outputs, int(x.ty.shape[1]) // how.get("groups", 1), *kernel)
    return emit(R.nn.conv3d(x, weight, **how))


def up(emit, x, kernel=(2, 2, 2), **how):
    return emit(R.nn.conv3d_transpose(x, constant(int(x.ty.shape[1]), 4, *kernel), **how))


def network(emit, x):
    """Padding, a residual sum, channels joined, pooling, a mean."""
    x = emit(R.add(conv(emit, x, padding=1), constant(1, C, 1, 1, 1)))
    x = emit(R.nn.max_pool3d(emit(R.nn.relu(x)), (2, 2, 2), (2, 2, 2)))
    y = emit(R.add(conv(emit, x, kernel=(3, 1, 1), padding=(1, 0, 0)), x))
    y = emit(R.concat([y, emit(R.multiply(y, relax.const(2.0)))], 1))
    return emit(R.mean(emit(R.nn.avg_pool3d(y, (1, 2, 2), (1, 2, 2))), [2, 3, 4]))


def gated(emit, x):
    """Squeeze and excitation."""
    x = conv(emit, x, padding=1)
    pooled = emit(R.mean(x, [2, 3, 4], keepdims=True))
    return emit(R.multiply(x, emit(R.sigmoid(conv(emit, pooled, kernel=(1, 1, 1))))))


PROGRAMS = {
    "one": lambda e, x: conv(e, x),
    "padded": lambda e, x: conv(e, x, padding=1),
    "uneven padding": lambda e, x: conv(e, x, padding=[2, 0, 1, 0, 1, 0]),
    "strides": lambda e, x: conv(e, x, padding=1, strides=(2, 1, 2)),
    "dilation": lambda e, x: conv(e, x, padding=2, dilation=(2, 2, 1)),
    "frames alone": lambda e, x: conv(e, x, kernel=(1, 3, 3), padding=(0, 1, 1), strides=(3, 1, 1)),
    "depth alone": lambda e, x: conv(e, x, kernel=(5, 1, 1), padding=(2, 0, 0)),
    "depthwise": lambda e, x: conv(e, conv(e, x, padding=1), padding=1, groups=C),
    "groups": lambda e, x: conv(e, conv(e, x), outputs=4, groups=2, strides=2),
    "max pooling": lambda e, x: e(R.nn.max_pool3d(conv(e, x), (3, 3, 2), (2, 2, 1), padding=(1, 1, 0))),
    "pooling that ceils": lambda e, x: e(R.nn.max_pool3d(conv(e, x), (2, 2, 2), (3, 2, 2), ceil_mode=True)),
    "padded mean": lambda e, x: e(
        R.nn.avg_pool3d(conv(e, x), (3, 3, 3), (2, 2, 2), padding=1, count_include_pad=True)
    ),
    "mean without padding": lambda e, x: e(R.nn.avg_pool3d(conv(e, x), (2, 3, 3), padding=(0, 1, 1))),
    "up": lambda e, x: up(e, x, strides=2),
    "up and out": lambda e, x: up(e, conv(e, x), strides=(2, 3, 2), output_padding=(0, 1, 0)),
    "back to volumes": lambda e, x: e(R.permute_dims(conv(e, x, padding=1), [0, 2, 3, 4, 1])),
    "gated": gated,
    "network": network,
}
STAY = {
    "mean that leaves padding out": lambda e, x: e(
        R.nn.avg_pool3d(conv(e, x), (3, 3, 3), padding=1, count_include_pad=False)
    ),
    "windows that meet": lambda e, x: up(e, conv(e, x), kernel=(3, 2, 2), strides=2),
}
"""Of these an operator stays 3-D; the convolution does not."""


def reference(mod, x):
    with tvm.target.Target("llvm"):
        executable = tvm.compile(relax.transform.LegalizeOps()(mod), target="llvm")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def three_dimensional(mod):
    names = [op_name(binding.value) for binding in mod["main"].body.blocks[0].bindings]
    return [name for name in names if "3d" in name]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [*PROGRAMS, *STAY])
def test_same_numbers(name, batch):
    shape = (batch, 5, 8, 7, 9)
    mod = build({"x": (shape, "float32")}, {**PROGRAMS, **STAY}[name])
    after = VolumesAsFrames()(mod)
    relax.analysis.well_formed(after)
    assert len(three_dimensional(after)) == (name in STAY)
    x = random(*shape)
    expected = reference(mod, x)
    found = reference(after, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("calibrated", [True, False])
def test_layers_are_quantized(calibrated):
    shape = (1, 5, 8, 7, 9)
    mod = build({"x": (shape, "float32")}, network)
    samples = [{"x": random(*shape, seed=seed)} for seed in range(4)]
    module = q.compile(mod, "native", calibration=samples if calibrated else None)
    assert sum(bool(layer.weight_layout) for layer in module.report.layers) == 2
    (found,) = module.run(samples[0])
    expected = reference(mod, samples[0]["x"])
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()
    assert not three_dimensional(prepare(mod))


def test_a_file_with_volumes():
    graph = onnx.parser.parse_graph("""
        volumes (float[1, 5, 8, 7, 9] x) => (float[1, 4, 1, 1, 1] y) {
            a = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, w, b)
            c = Relu (a)
            d = MaxPool <kernel_shape = [2, 2, 2], strides = [2, 2, 2]> (c)
            y = GlobalAveragePool (d)
        }
    """)
    arrays = {"w": random(4, 5, 3, 3, 3), "b": random(4, seed=1)}
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    x = random(1, 5, 8, 7, 9)
    (expected,) = onnx.reference.ReferenceEvaluator(made).run(None, {"x": x})
    module = q.compile(made)
    (found,) = module.run({"x": x})
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    assert not three_dimensional(prepare(load_model(made).mod))
