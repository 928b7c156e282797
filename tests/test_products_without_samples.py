"""Products of two activations without samples: scales of samples and, of what a softmax gives, of rows."""

import numpy as np
import pytest
from cuda_emulator import run_program
from models import heads
from quantized_programs import RUNS, TARGETS, TILES, build, machine_runs, program, random_codes, run
from relax_programs import build as network
from relax_programs import constant, random
from test_cuda import NEEDS_COMPILER
from test_cuda_modules import lowered_for_cuda
from test_fold_heads import ON_TILES, swapped
from tvm import relax
from tvm.relax import op as R

import tvm_qfp8
from tvm_qfp8.calibration import calibrate, evaluate, evaluate_quantized
from tvm_qfp8.calibration.without_samples import FEW_MACS, IS_INPUT
from tvm_qfp8.format import get_layout
from tvm_qfp8.importers import load_model
from tvm_qfp8.relay_passes import qfp8_ops
from tvm_qfp8.relay_passes.fold_heads import SWAPPED, FoldHeads
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.topi import reference
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape


@pytest.mark.parametrize("isa", [*RUNS, *ON_TILES])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("inside", [(False, False), (True, True)])
@pytest.mark.parametrize("threads, rows, columns, depth", [(1, 5, 7, 9), (2, 70, 33, 64)])
def test_a_product_is_its_twin(isa, threads, inside, by_rows, rows, columns, depth):
    """Heads of y and of the result may lie inside; scales stand in the order of x's rows."""
    rng = np.random.default_rng(depth)
    x, y = random_codes(rng, (2, 3, rows, depth)), random_codes(rng, (2, 3, depth, columns))
    x_scales = rng.random((2, 3, rows) if by_rows else 2, np.float32)
    y_scales = rng.random(2, np.float32)
    shape = BatchMatmulShape(6, rows, columns, depth, get_layout("UE2M6"), get_layout("E3M4"), False)
    of_x = x_scales[..., None] if by_rows else x_scales[:, None, None, None]
    expected = reference.batch_matmul(x, y, shape) * np.float32(0.25) * of_x * y_scales[:, None, None, None]

    def emit(builder, a, b, *scales):
        b = builder.emit(R.permute_dims(b, SWAPPED)) if inside[0] else b
        call = qfp8_ops.batch_matmul(a, b, 0.25, transpose_y=False, x_scales=scales[0], y_scales=scales[1])
        product = builder.emit(call)
        return R.permute_dims(product, SWAPPED) if inside[1] else product

    given = [x, swapped(y) if inside[0] else y, x_scales, y_scales]
    layouts = ["UE2M6", "E3M4", None, None]
    mod = FoldHeads()(program([(g.shape, layout) for g, layout in zip(given, layouts, strict=True)], emit))
    (found,) = run(build(mod, TARGETS.get(isa, TILES), threads), *given)
    np.testing.assert_array_equal(found, swapped(expected) if inside[1] else expected)


NORM = "normed = LayerNormalization <axis = -1> (x, one)"


def attention(tokens=170, batch=2):
    """Of what the network computes itself."""
    projections = (f"MatMul (normed, {name})" for name in "qkv")
    return heads((batch, tokens, 64), *projections, before=NORM, scale=0.1)


def attention_of_inputs():
    """Its queries and keys are the module's input."""
    return heads((2, 170, 64), "Identity (x)", "Identity (x)", scale=0.1)


def canonical(model):
    return prepare(load_model(model).mod)


def inputs(tokens=170, batch=2):
    x = np.random.default_rng(1).standard_normal((batch, tokens, 64), np.float32)
    x[0] *= np.linspace(0.1, 30, tokens, dtype=np.float32)[:, None]
    return {"x": x}


def test_queries_and_keys_have_scales_of_samples_and_shares_of_rows():
    mod = canonical(attention())
    plan = calibrate(mod, None)
    (q, k), (shares, v) = plan.products.values()
    assert [one.described for one in (q, k, v)] == ["E3M4 by sample", "E3M4 by sample", "E2M5 by sample"]
    assert shares.described == "UE2M6 by row"
    exact, found = evaluate(mod, inputs())[0], evaluate_quantized(mod, plan, inputs())[0]
    assert np.square(exact).sum() > 10**2.5 * np.square(found - exact).sum()
    module = tvm_qfp8.compile(attention(), "native")
    # The exponential inside a softmax may err, and what lies at the edge of two codes becomes the other.
    other = module.run(inputs())[0] - found
    assert np.square(other).sum() < 1e-4 * np.square(found).sum()
    described = [layer.became for layer in module.report.layers if layer.operator == "matmul"]
    assert "QFP8 UE2M6 by row x E2M5 by sample" in described


def test_samples_of_a_batch_are_by_themselves():
    module = tvm_qfp8.compile(attention(), "native")
    given = inputs()
    both = module.run(given)[0]
    given["x"][1] *= 100
    np.testing.assert_array_equal(module.run(given)[0][0], both[0])


def test_few_tokens_and_inputs_stay_float32():
    few, of_inputs = (calibrate(canonical(made), None) for made in (attention(128), attention_of_inputs()))
    assert not few.products and set(few.skipped.values()) == {FEW_MACS}
    assert len(of_inputs.products) == 1 and set(of_inputs.skipped.values()) == {IS_INPUT}


def test_layouts_that_are_asked_for():
    mod = canonical(attention())
    assert not calibrate(mod, None, tvm_qfp8.Config(activations="float32")).products
    products = calibrate(mod, None, tvm_qfp8.Config(activations="E1M6")).products
    assert {one.layout for operands in products.values() for one in operands} == {"E1M6"}
    unsigned = calibrate(mod, None, tvm_qfp8.Config(activations="UE1M7"))
    assert not unsigned.products and all(
        "no negative values" in reason for reason in unsigned.skipped.values()
    )


@pytest.mark.parametrize("tokens_first", [False, True])
def test_tokens_before_the_batch(tokens_first):
    """As torch's MultiheadAttention has them: what is the first dimension before a transposition is no sample."""
    shape = (170, 3, 64) if tokens_first else (3, 170, 64)

    def body(emit, x):
        def dense(seed):
            return emit(R.matmul(emit(R.tanh(x)), constant(64, 64, seed=seed, scale=0.1)))

        q, k, v = map(dense, range(3))
        scale = np.linspace(0.2, 4, shape[0], dtype=np.float32)[:, None, None]
        k = emit(R.multiply(k, relax.const(scale)))
        if tokens_first:
            q, v = (emit(R.permute_dims(part, [1, 0, 2])) for part in (q, v))
        turned = emit(R.permute_dims(k, [1, 2, 0] if tokens_first else [0, 2, 1]))
        return emit(R.matmul(emit(R.nn.softmax(emit(R.matmul(q, turned)), -1)), v))

    mod = network({"x": (shape, "float32")}, body)
    plan = calibrate(mod, None)
    assert len(plan.products) == 2
    x = {"x": random(*shape)}
    expected, found = evaluate_quantized(mod, plan, x)[0], tvm_qfp8.compile(mod, "native").run(x)[0]
    assert np.square(expected).sum() > 1e3 * np.square(found - expected).sum()


def test_single_matrices_have_no_samples():
    def body(emit, x):
        return emit(R.matmul(emit(R.tanh(x)), emit(R.permute_dims(emit(R.tanh(x)), [1, 0]))))

    assert not calibrate(network({"x": ((170, 64), "float32")}, body), None).products


@pytest.mark.slow
@NEEDS_COMPILER
def test_the_bits_of_the_cpu(tmp_path):
    """Such kernels, run by the emulator."""
    here = tvm_qfp8.compile(attention(), "native")
    (found,) = run_program(lowered_for_cuda(attention(), None), [inputs()["x"]], tmp_path)
    np.testing.assert_array_equal(found, here.run(inputs())[0])


@pytest.mark.skipif(not machine_runs(TILES), reason="this CPU has no tile registers")
def test_tiles_give_the_bits_of_vectors():
    by_tiles, by_vectors = (
        tvm_qfp8.compile(attention(), target).run(inputs())[0] for target in (TILES, TARGETS["avx2"])
    )
    np.testing.assert_array_equal(by_tiles, by_vectors)
