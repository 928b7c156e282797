"""An encode moves above what only moves or repeats values, so that bytes are moved."""

import numpy as np
import pytest
from relax_programs import build, constant, random
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.calibration import calibrate, evaluate_quantized
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.quantize_linear import QuantizeLinear


def upsampled(method, readers):
    """Detector's neck: a layer, its pixels repeated beside others, and layers that read both."""

    def body(emit, x, y):
        def layer(z, seed):
            weight = constant(8, 1, 1, int(z.ty.shape[-1]), seed=seed, scale=0.3)
            return emit(R.nn.conv2d(z, weight, data_layout="NHWC", kernel_layout="OHWI"))

        large = emit(
            R.image.resize2d(
                layer(x, 1),
                (10, 10),
                layout="NHWC",
                method=method,
                coordinate_transformation_mode="asymmetric",
                rounding_method="floor",
            )
        )
        joined = emit(R.concat([large, layer(y, 2)], -1))
        found = layer(joined, 3)
        for seed in range(4, 3 + readers):
            found = emit(R.add(found, layer(joined, seed)))
        return found

    return build({"x": ((1, 5, 5, 8), "float32"), "y": ((1, 10, 10, 8), "float32")}, body)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("method", ["nearest_neighbor", "linear"])
def test_repeated_pixels(method, readers):
    mod, samples = (
        upsampled(method, readers),
        [{"x": random(1, 5, 5, 8, seed=i), "y": random(1, 10, 10, 8, seed=9 + i)} for i in range(4)],
    )
    plan = calibrate(mod, samples)
    resized = [
        binding.value
        for binding in QuantizeLinear(plan)(mod)["main"].body.blocks[0].bindings
        if op_name(binding.value) == "relax.image.resize2d"
    ]
    assert any("custom" in str(value.ty.dtype) for value in resized) == (method == "nearest_neighbor")
    compiled = tvm_qfp8.compile(mod, "native", calibration=samples)
    expected = evaluate_quantized(mod, plan, samples[0])[0]
    np.testing.assert_allclose(compiled.run(samples[0])[0], expected, atol=0.02 * np.abs(expected).max())
