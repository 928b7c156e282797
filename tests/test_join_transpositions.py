"""Chains of views and transpositions become one transposition, and move the same elements."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from tvm_qfp8.calibration.evaluate import Program, evaluate
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.join_transpositions import JoinTranspositions
from tvm_qfp8.relay_passes.prepare import prepare

RESHAPE, TURN = "relax.reshape", "relax.permute_dims"


def program(shape, *steps, also=()):
    """``steps`` are axes (lists) or shapes (tuples); results of those numbered in ``also`` are outputs, too."""
    builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            results = [x]
            for step in steps:
                call = op.permute_dims if isinstance(step, list) else op.reshape
                results.append(builder.emit(call(results[-1], step)))
            outputs = [builder.emit(op.negative(results[i + 1])) for i in (*also, len(steps) - 1)]
            output = builder.emit_output(relax.Tuple(outputs) if also else outputs[0])
        builder.emit_func_output(output)
    return builder.get()


def moves(mod):
    """Operators that only move, and the axes of transpositions."""
    values = [b.value for block in mod["main"].body.blocks for b in block.bindings]
    found = [value for value in values if op_name(value) in (RESHAPE, TURN)]
    return [[int(axis) for axis in v.attrs.axes] if op_name(v) == TURN else "reshape" for v in found]


def joined(mod, shape):
    """The program after the pass, which gives the same."""
    after = JoinTranspositions()(mod)
    x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    for exact, found in zip(evaluate(mod, x), evaluate(after, x), strict=True):
        np.testing.assert_array_equal(found, exact)
    return after


CHAINS = {
    "parts of a projection": ((1, 5, 12), [(1, 5, 1, 3, 4), [3, 1, 2, 0, 4], (3, 5, 1, 4)]),
    "heads of queries": ((5, 1, 12), [(5, 3, 4), [1, 0, 2], (1, 3, 5, 4)]),
    "heads of keys": ((1, 5, 12), [(5, 1, 3, 4), [1, 2, 3, 0]]),
    "heads together": ((1, 3, 5, 4), [[2, 0, 1, 3], (5, 1, 12)]),
    "two transpositions": ((2, 3, 4), [[1, 0, 2], [0, 2, 1]]),
}
EXPECTED = {
    "parts of a projection": ["reshape", [2, 1, 0, 3]],
    "heads of queries": ["reshape", [0, 2, 1, 3]],
    "heads of keys": ["reshape", [0, 2, 3, 1]],
    "heads together": [[0, 2, 1, 3], "reshape"],
    "two transpositions": [[1, 2, 0]],
}


@pytest.mark.parametrize("name", CHAINS)
def test_one_transposition_is_left(name):
    shape, steps = CHAINS[name]
    assert moves(joined(program(shape, *steps), shape)) == EXPECTED[name]


KEPT = {
    "one transposition": ((1, 5, 3, 4), [[0, 2, 1, 3]]),
    "of an image": ((1, 7, 7, 4), [[0, 3, 1, 2], (1, 196)]),
    "heads of a batch": ((2, 5, 12), [(2, 5, 3, 4), [0, 2, 1, 3], (6, 5, 4)]),
    "nothing": ((0, 5, 12), [[1, 0, 2], [0, 2, 1]]),
    "one element": ((1, 1, 1), [[1, 0, 2], (1, 1)]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_get_shorter_stays(name):
    shape, steps = KEPT[name]
    mod = program(shape, *steps)
    assert moves(joined(mod, shape)) == moves(mod)


def test_what_is_read_between_is_computed_once():
    shape, steps = CHAINS["two transpositions"]
    mod = program(shape, *steps, also=[0])
    assert moves(joined(mod, shape)) == moves(mod)


@pytest.mark.parametrize("seed", range(40))
def test_the_same_elements_are_moved(seed):
    rng = np.random.default_rng(seed)
    shape = extents = tuple(int(n) for n in rng.choice([1, 1, 2, 3, 4], rng.integers(1, 6)))
    steps = []
    for _ in range(rng.integers(1, 6)):
        if rng.random() < 0.5:
            steps.append([int(axis) for axis in rng.permutation(len(extents))])
            extents = tuple(extents[axis] for axis in steps[-1])
            continue
        factors = [f for n in extents for f in ((2, 2) if n == 4 and rng.random() < 0.5 else (n,))]
        while len(factors) > 1 and rng.random() < 0.5:
            at = int(rng.integers(len(factors) - 1))
            factors[at : at + 2] = [factors[at] * factors[at + 1]]
        factors.insert(int(rng.integers(len(factors) + 1)), 1)
        extents = tuple(factors)
        steps.append(extents)
    mod = program(shape, *steps)
    assert len(moves(joined(mod, shape))) <= len(moves(mod))


@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorch_attention_reads_its_projections(batch_first):
    """Queries, keys and values are dense layers of their own, without copies but for heads."""
    torch = pytest.importorskip("torch", reason="torch is an extra")
    from tvm_qfp8.importers import load_model

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(64, 4, batch_first=batch_first)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn((1, 10, 64) if batch_first else (10, 1, 64))
    net = Net().eval()
    mod = prepare(load_model(torch.export.export(net, (x,))).mod)
    names = [step.operator for step in Program(mod).steps]
    assert names.count("relax.take") == 0
    assert names.count("relax.matmul") == 4 + 2  # four dense layers, two products of activations
    assert sum(axes != "reshape" for axes in moves(mod)) <= 4
    found = evaluate(mod, dict(zip(Program(mod).inputs, [x.numpy()], strict=True)))[0]
    np.testing.assert_allclose(found, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)
