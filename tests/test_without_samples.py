"""Without calibration samples linear layers read rows or samples with scales found at run time, or float32."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_emulator import run_program
from models import cnn, encoder, images, model
from onnx import helper
from quantized_programs import RUNS, TARGETS
from relax_programs import NHWC, build, constant, random
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8 as q
from tvm_qfp8.calibration import calibrate, evaluate, evaluate_quantized
from tvm_qfp8.calibration.evaluate import Program
from tvm_qfp8.calibration.without_samples import IS_INPUT, values_of_inputs
from tvm_qfp8.config import Config
from tvm_qfp8.errors import CalibrationError, InputError
from tvm_qfp8.format import get_layout
from tvm_qfp8.topi import reference

DEPTH, ROTATABLE, COLUMNS = 70, 72, 33
WEIGHT, BIAS = constant(DEPTH, COLUMNS), constant(COLUMNS, seed=1)
ROTATED = "E1M6 by row, rotated"

BEFORE = {R.negative: np.negative, R.abs: np.abs}


def dense(shape=(9, DEPTH), before=R.negative):
    """A dense layer that reads what ``before`` makes of the input."""

    def body(emit, x):
        return emit(R.add(emit(R.matmul(emit(before(x)), constant(shape[-1], COLUMNS))), BIAS))

    return build({"x": (shape, "float32")}, body)


def twin(x, layout="E3M4", before=R.negative, activations="auto"):
    """The layer's exact result: integer sums, then the scales of columns and rows."""
    plan = calibrate(dense(x.shape, before), None, Config(activations=activations))
    (chosen,) = plan.linear.values()
    weight = chosen.weight
    assert chosen.activation.layout == layout
    codes, scales = reference.encode_rows(
        BEFORE[before](x), get_layout(layout), rotation=chosen.activation.rotation
    )
    total = reference.matmul(codes, weight.codes.T, get_layout(layout), get_layout(weight.layout))
    return reference.scale_and_bias(total, np.asarray(weight.scale).reshape(-1), BIAS.value.numpy(), scales)


def matmuls(report):
    return [layer for layer in report.layers if layer.operator == "matmul"]


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("shape", [(9,), (1,), (2, 3)])
@pytest.mark.parametrize(
    "depth, before, layout, described",
    [
        (DEPTH, R.negative, "E3M4", "E3M4 by row"),
        (ROTATABLE, R.negative, "E1M6", ROTATED),
        (ROTATABLE, R.abs, "UE3M5", "UE3M5 by row"),
    ],
    ids=["signed", "rotated", "above zero"],
)
def test_a_dense_layer_is_its_twin(isa, shape, depth, before, layout, described):
    x = random(*shape, depth)
    x[:1] *= 1000  # rows of their own size
    module = q.compile(dense(x.shape, before), TARGETS[isa])
    (layer,) = matmuls(module.report)
    assert (layer.became, layer.activation_layout) == ("QFP8", described)
    np.testing.assert_array_equal(module.run({"x": x})[0], twin(x, layout, before))


@pytest.mark.parametrize("layout", ["E2M5", "E1M6"])
def test_a_layout_that_is_asked_for(layout):
    x = random(9, ROTATABLE)
    module = q.compile(dense(x.shape), config=Config(activations=layout))
    (layer,) = matmuls(module.report)
    assert layer.activation_layout == f"{layout} by row"
    assert layout == "E2M5" or layer.weight_layout == "E1M6"  # bytes with bytes
    np.testing.assert_array_equal(module.run({"x": x})[0], twin(x, layout, activations=layout))


@pytest.mark.parametrize("strides", [1, 2])
def test_pixels_are_rotated(strides):
    """A 1x1 convolution over channels of which few stand out, ever others."""
    weight, stride = constant(160, 1, 1, 64), {"strides": (strides, strides)}

    def body(emit, x):
        return emit(R.nn.conv2d(emit(R.negative(x)), weight, **NHWC, **stride))

    x = random(2, 4, 5, 64)
    for place, pixel in enumerate(x.reshape(-1, 64)):
        pixel[[place, place + 20]] *= 15
    mod = build({"x": (x.shape, "float32")}, body)
    (chosen,) = calibrate(mod, None).linear.values()
    module = q.compile(mod)
    (layer,) = module.report.layers
    assert layer.activation_layout == ROTATED
    codes, scales = reference.encode_rows(-x, get_layout("E1M6"), rotation=16)
    codes, scales = codes[:, ::strides, ::strides], scales[:, ::strides, ::strides]
    both = get_layout("E1M6"), get_layout(chosen.weight.layout)
    total = reference.matmul(codes, chosen.weight.codes.reshape(160, 64), *both)
    of_channels = np.asarray(chosen.weight.scale).reshape(-1)
    (found,) = module.run({"x": x})
    np.testing.assert_array_equal(
        found, reference.scale_and_bias(total, of_channels, np.zeros(160, np.float32), scales)
    )
    exact = -x[:, ::strides, ::strides] @ weight.value.numpy().reshape(160, 64).T
    plain = q.compile(mod, config=Config(activations="E1M6")).run({"x": x})[0]
    off, off_plain = (float(np.square(one - exact).sum()) for one in (found, plain))
    assert 3 * off < off_plain


def test_cuda_gives_the_same_bits(tmp_path):
    from tvm_qfp8.relay_passes.for_cuda import ForCuda
    from tvm_qfp8.relay_passes.lower_groups import LowerGroups
    from tvm_qfp8.relay_passes.quantize_linear import QuantizeLinear
    from tvm_qfp8.targets import parse_target
    from tvm_qfp8.topi.isa import instruction_set

    mod = dense((20, DEPTH))
    quantized = QuantizeLinear(calibrate(mod, None))(mod)
    with parse_target("cuda-sm80"):
        lowered = ForCuda()(LowerGroups(instruction_set("cuda", frozenset()), 1)(quantized))
    x = random(20, DEPTH)
    np.testing.assert_array_equal(run_program(lowered, [x], tmp_path)[0], twin(x))


@pytest.mark.parametrize("calibration", [None, [{"x": random(9, DEPTH)}]])
def test_float32_activations_by_configuration(calibration):
    module = q.compile(dense(), calibration=calibration, config=Config(activations="float32"))
    (layer,) = matmuls(module.report)
    assert (layer.became, layer.activation_layout) == ("QFP8 weights", "float32")
    x = random(9, DEPTH, seed=3)
    exact = -x @ WEIGHT.value.numpy() + BIAS.value.numpy()
    off = np.abs(module.run({"x": x})[0] - exact)
    assert off.max() < 0.03 * np.abs(exact).max()
    if calibration is not None:
        assert layer.reason == "activations stay float32 by configuration" and layer.sqnr_db > 35


def test_inputs_stay_float32_unless_a_layout_is_asked_for():
    """A column of the input may be years, another an income: a common scale would lose the years."""
    x = random(9, DEPTH)
    x[:, 1] *= 1e6
    weight = WEIGHT.value.numpy().copy()
    weight[1] = 0

    def body(emit, x):
        return emit(R.matmul(emit(R.reshape(x, (9, DEPTH))), relax.const(weight)))

    mod = build({"x": ((3, 3, DEPTH), "float32")}, body)
    given = {"x": x.reshape(3, 3, DEPTH)}
    module = q.compile(mod)
    (layer,) = matmuls(module.report)
    assert (layer.became, layer.reason) == ("QFP8 weights", IS_INPUT)
    np.testing.assert_allclose(module.run(given)[0], x @ weight, atol=0.6)
    forced = q.compile(mod, config=Config(activations="E3M4"))
    assert matmuls(forced.report)[0].activation_layout == "E3M4 by row"
    assert not forced.run(given)[0].any()  # as it must be here


@pytest.mark.parametrize(
    "colours, window, layout",
    [(3, 3, "E1M6 by sample"), (1, 3, "float32"), (4, 3, "float32"), (3, 1, "float32")],
)
def test_an_image_that_is_the_input_has_colours_of_one_unit(colours, window, layout):
    def body(emit, x):
        return emit(R.nn.conv2d(x, constant(64, window, window, colours), **NHWC))

    mod = build({"x": ((2, 6, 7, colours), "float32")}, body)
    module = q.compile(mod)
    (layer,) = module.report.layers
    assert layer.activation_layout == layout
    x = random(2, 6, 7, colours)
    x[0] *= 1000
    (expected,) = evaluate_quantized(mod, calibrate(mod, None), {"x": x})
    for found, sample in zip(module.run({"x": x})[0], expected, strict=True):
        np.testing.assert_allclose(found, sample, atol=1e-4 * np.abs(sample).max())


def test_what_is_a_value_of_an_input():
    def body(emit, x, y):
        parts = emit(R.split(x, 2, axis=1))
        joined = emit(R.concat([emit(relax.TupleGetItem(parts, 0)), emit(R.abs(y))], axis=1))
        taken = emit(R.take(constant(5, 4), emit(R.astype(emit(R.max(x, axis=1)), "int32")), axis=0))
        return emit(R.add(emit(R.mean(joined, axis=1, keepdims=True)), taken))

    program = Program(build({"x": ((2, 4), "float32"), "y": ((2, 4), "float32")}, body))
    held = values_of_inputs(program)
    operators = {step.operator.removeprefix("relax."): step.name in held for step in program.steps}
    expected = {"split": True, "tuple_get_item": True, "concat": True}
    assert operators == expected | dict.fromkeys(
        ("abs", "max", "astype", "take", "mean", "add", "alias"), False
    )


@pytest.mark.parametrize(
    "moved", [lambda x: R.flip(x, 1), lambda x: R.tile(x, (2, 1)), lambda x: R.repeat(x, 2, 0)]
)
def test_a_moved_input_is_one_still(moved):
    program = Program(build({"x": ((2, 4), "float32")}, lambda emit, x: emit(moved(x))))
    assert {step.name for step in program.steps} <= values_of_inputs(program)


def test_where_e3m4_could_overflow_rows_are_narrower():
    """The grid values of a weight whose values are all alike are the largest there are."""

    def narrow(depth):
        mod = build(
            {"x": ((2, depth), "float32")},
            lambda emit, x: emit(R.matmul(emit(R.negative(x)), relax.const(np.ones((depth, 3), np.float32)))),
        )
        (chosen,) = calibrate(mod, None).linear.values()
        return chosen.activation.layout, mod

    assert narrow(4001)[0] == "E3M4"
    layout, mod = narrow(12001)
    assert layout == "E2M5"
    x = -np.abs(random(2, 12001))
    np.testing.assert_allclose(
        q.compile(mod).run({"x": x})[0], -x.sum(1, keepdims=True) + [0, 0, 0], rtol=1e-2
    )


def test_layers_of_all_kinds():
    module = q.compile(cnn())
    layers = {layer.operator: layer for layer in module.report.layers}
    assert layers["conv2d"].became == "QFP8 weights" and layers["matmul"].became == "QFP8"
    assert any("3 of 4 linear layers" in note for note in module.report.notes)
    x = images(1)[0]
    canonical = _canonical(cnn())
    expected = evaluate_quantized(canonical, calibrate(canonical, None), x)[0]
    np.testing.assert_allclose(module.run(x)[0], expected, atol=2e-3)


def _canonical(mod):
    from tvm_qfp8.importers import load_model
    from tvm_qfp8.relay_passes.prepare import prepare

    return prepare(load_model(mod).mod)


def test_skipped_layers_and_those_that_share_a_weight():
    def body(emit, x):
        x = emit(R.abs(x))
        first, second = (emit(R.matmul(x, constant(DEPTH, DEPTH))) for _ in range(2))
        return emit(R.matmul(emit(R.add(first, emit(R.abs(second)))), WEIGHT))

    mod = build({"x": ((4, DEPTH), "float32")}, body)
    plan = calibrate(mod, None)
    first, second, third = plan.linear.values()
    assert first.weight is second.weight and third.weight is not first.weight
    assert all(one.activation.by_rows and one.activation.factors is None for one in plan.linear.values())
    name = matmuls(q.compile(mod).report)[2].name
    report = q.compile(mod, config=Config(skip=(name,))).report
    assert [layer.became for layer in matmuls(report)] == ["QFP8", "QFP8", "float32"]


@pytest.mark.parametrize("before, described", [(R.negative, ROTATED), (R.abs, "UE3M5 by row")])
def test_layers_of_one_weight_are_rotated_if_all_can_be(before, described):
    """As in ALBERT, whose blocks are the same: weights meet rows that are all turned alike."""
    weight = constant(ROTATABLE, ROTATABLE, scale=0.2)

    def body(emit, x):
        first = emit(R.matmul(emit(R.negative(x)), weight))
        return emit(R.matmul(emit(before(first)), weight))

    mod = build({"x": ((9, ROTATABLE), "float32")}, body)
    first, second = matmuls(q.compile(mod).report)
    assert second.activation_layout == described
    assert first.activation_layout == (ROTATED if before is R.negative else "E3M4 by row")
    plan = calibrate(mod, None)
    one, other = plan.linear.values()
    assert one.weight is other.weight
    x = {"x": random(9, ROTATABLE)}
    (expected,), (found,) = evaluate(mod, x), q.compile(mod).run(x)
    assert np.square(found - expected).sum() < 10**-2.5 * np.square(expected).sum()


def test_an_open_batch_of_several_lengths_runs_each_sample_alone():
    shapes = {name: ("n", [4, 9]) for name in ("ids", "mask")}
    module = q.compile(encoder(), input_shapes=shapes)
    assert all(
        layer.activation_layout == "E3M4 by row" for layer in matmuls(module.report) if layer.bytes_before
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 30, (3, 6))
    given = {"ids": ids, "mask": np.ones_like(ids)}
    (together,) = module.run(given)
    alone = [module.run({name: array[i : i + 1] for name, array in given.items()})[0] for i in range(3)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert module.run({name: array[:0] for name, array in given.items()})[0].shape == (0, *together.shape[1:])


@pytest.mark.parametrize("depth", [DEPTH, ROTATABLE])
def test_infinity_and_nan_inside_stay_in_their_rows_and_leave_no_nan(depth):
    module = q.compile(dense((9, depth), before=R.log))
    x = np.abs(random(9, depth)) + 1
    x[2, 3], x[4, 5] = 0, -1
    found, calm = (module.run({"x": given})[0] for given in (x, np.where(x > 0, x, 1).astype(np.float32)))
    assert not np.isnan(found).any() and np.isfinite(found[4]).all()
    others = (
        [2, 4] if depth == ROTATABLE else [2]
    )  # a NaN reads as 0, log(1); rotated it is in several channels
    np.testing.assert_array_equal(np.delete(found, others, 0), np.delete(calm, others, 0))
    x[0, 0] = np.nan
    with pytest.raises(InputError, match="'x'"):
        module.run({"x": x})


@pytest.mark.parametrize(
    "name, error, message",
    [("E4M3", CalibrationError, "for comparisons only; use E2M5"), ("E9", InputError, "'E9' is not known")],
)
def test_layouts_that_no_kernel_computes_are_refused(name, error, message):
    for samples in (None, [{"x": random(9, DEPTH)}]):
        with pytest.raises(error, match=message):
            q.compile(dense(), calibration=samples, config=Config(activations=name))


def test_a_layout_without_a_sign_has_to_be_known_to_fit():
    module = q.compile(dense(), config=Config(activations="UE2M6"))
    (layer,) = matmuls(module.report)
    assert layer.became == "QFP8 weights" and "no negative values" in layer.reason
    assert any("only weights" in note for note in module.report.notes)
    (layer,) = matmuls(q.compile(dense(before=R.abs), config=Config(activations="UE2M6")).report)
    assert (layer.became, layer.activation_layout) == ("QFP8", "UE2M6 by row")


def test_torch_layers():
    torch = pytest.importorskip("torch", reason="torch is an extra")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, activation="gelu", batch_first=True).eval()
    x = torch.randn(2, 10, 64)
    with torch.no_grad():
        expected = layer(x).numpy()
    module = q.compile(torch.export.export(layer, (x,)))
    dense_layers = [found for found in matmuls(module.report) if found.bytes_before]
    by_row = [found for found in dense_layers if found.activation_layout == ROTATED]
    assert len(by_row) == 3 and all(found.reason == IS_INPUT for found in dense_layers if found not in by_row)
    found = module(x.numpy())[0]
    assert 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()) > 30


def test_command_line(tmp_path):
    import onnx
    from typer.testing import CliRunner

    from tvm_qfp8.cli import app

    constants = {"w": WEIGHT.value.numpy()}
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("MatMul", ["a", "w"], ["y"])]
    path, out = tmp_path / "dense.onnx", tmp_path / "dense.so"
    onnx.save(model(nodes, {"x": (4, DEPTH)}, {"y": (4, COLUMNS)}, constants), path)
    for options, described in (
        ((), "E3M4 by row"),
        (("--activations", "float32"), "only weights are quantized"),
    ):
        result = CliRunner().invoke(app, ["compile", str(path), "-o", str(out), *options])
        assert result.exit_code == 0 and described in result.output
