"""The emulator fixture itself: both ways to call, several types, several outputs, and its errors."""

import numpy as np
import pytest

pytestmark = pytest.mark.aarch64


@pytest.fixture
def arm():
    from tvm_qfp8.targets import parse_target

    return parse_target("aarch64")


def _kernel(arm):
    import tvm
    from tvm.script import tirx as T

    @T.prim_func
    def scale(a: T.Buffer((3, 5), "float32"), b: T.Buffer((5,), "int8"), c: T.Buffer((3, 5), "float32")):
        for i in range(3):
            for j in range(5):
                c[i, j] = a[i, j] * T.Cast("float32", b[j])

    return tvm.compile(tvm.IRModule({"scale": scale.with_attr("global_symbol", "scale")}), target=arm)


def test_prim_func(run_aarch64, arm):
    a = np.linspace(-2, 2, 15, dtype=np.float32).reshape(3, 5)
    b = np.array([-128, -1, 0, 1, 127], np.int8)
    (c,) = run_aarch64(_kernel(arm), [a, b], function="scale", outputs=[((3, 5), "float32")])
    np.testing.assert_array_equal(c, a * b)


def test_unknown_function(run_aarch64, arm):
    with pytest.raises(RuntimeError, match="no function other"):
        run_aarch64(_kernel(arm), [], function="other", outputs=[])


@pytest.mark.parametrize("tuple_output", [False, True])
def test_relax_module(run_aarch64, arm, tuple_output):
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        y = builder.emit(relax.op.add(x, relax.const(np.ones((2, 3), np.float32))))
        z = builder.emit(relax.op.astype(x, "int32"))
        builder.emit_func_output(relax.Tuple([y, z]) if tuple_output else y)
    executable = tvm.compile(builder.get(), target=arm)
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    outputs = run_aarch64(executable, [value])
    np.testing.assert_array_equal(outputs[0], value + 1)
    assert len(outputs) == 1 + tuple_output
    if tuple_output:
        np.testing.assert_array_equal(outputs[1], value.astype(np.int32))
        assert outputs[1].dtype == np.int32
