"""Einstein sums become matmuls with the numbers of NumPy's."""

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper
from test_canonicalize import operators
from tvm import relax

import tvm_qfp8
from tvm_qfp8.calibration.evaluate import evaluate
from tvm_qfp8.relay_passes.einsum_products import EinsumProducts, labels_of

RNG = np.random.default_rng(0)
EXTENTS = dict(zip("abcdefijkn", (2, 3, 4, 5, 1, 6, 7, 3, 2, 5), strict=True))


def program(subscripts: str, shapes: list[tuple[int, ...]]) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs, attrs={"num_input": len(inputs)}):
        with builder.dataflow():
            out = builder.emit_output(relax.op.einsum(inputs, subscripts))
        builder.emit_func_output(out)
    return builder.get()


def check(subscripts: str, shapes: list[tuple[int, ...]]) -> list[str]:
    """The operators that it becomes."""
    mod = EinsumProducts()(program(subscripts, shapes))
    inputs = {f"x{i}": RNG.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    expected = np.einsum(subscripts, *inputs.values())
    np.testing.assert_allclose(evaluate(mod, inputs)[0], expected, rtol=1e-4, atol=1e-4)
    return operators(mod)


@pytest.mark.parametrize(
    "subscripts",
    [
        "ij,jk->ik",
        "ij, jk",
        "ja,ai",
        "ibnd,jbnd->bnij",
        "bnij,jbnd->ibnd",
        "ibnd,fnd->ibf",
        "ibf,fnd->ibnd",
        "ij,ij->",
        "ij,ij->i",
        "ij,ij->ji",
        "i,j->ij",
        "a,bc->cab",
        "abc,c->ab",
        "c,abc->ab",
        "abcd,bd->acb",
        "abc,dc->ad",
        "abc,ad->ab",
        "ab,bc,cd->ad",
        "ab,ac,ad->bcd",
        "abc->cb",
        "abc->ca",
        "ebc,ecd->ebd",
        "abcd,abed->abce",
    ],
)
def test_the_numbers_are_those_of_numpy(subscripts):
    operands = subscripts.replace(" ", "").partition("->")[0].split(",")
    left = check(subscripts, [tuple(EXTENTS[name] for name in labels) for labels in operands])
    assert "relax.einsum" not in left


@pytest.mark.parametrize(
    "subscripts, shapes",
    [
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (2, 3, 5, 6)]),
        ("...ij,jk->...ik", [(2, 3, 4, 5), (5, 6)]),
        ("...i,...i->...", [(2, 3, 4), (4,)]),
        ("i...,...j", [(3, 2, 4), (2, 4, 5)]),
        ("...i,i", [(2, 3, 4), (4,)]),
    ],
)
def test_an_ellipsis(subscripts, shapes):
    assert "relax.einsum" not in check(subscripts, shapes)


@pytest.mark.parametrize(
    "subscripts, shapes", [("ii,ij->ij", [(3, 3), (3, 4)]), ("...ij,...jk->...ik", [(1, 4, 5), (2, 5, 6)])]
)
def test_diagonals_and_repeated_axes_stay(subscripts, shapes):
    assert check(subscripts, shapes) == ["relax.einsum"]


@pytest.mark.parametrize(
    "subscripts, shapes",
    [("ibnd,jbnd->bnij", [(4, 0, 2, 3), (5, 0, 2, 3)]), ("bij,bjk->bik", [(2, 4, 0), (2, 0, 3)])],
)
def test_extents_of_zero(subscripts, shapes):
    inputs = {f"x{i}": np.ones(shape, np.float32) for i, shape in enumerate(shapes)}
    found = tvm_qfp8.compile(program(subscripts, shapes)).run(inputs)[0]
    np.testing.assert_array_equal(found, np.einsum(subscripts, *inputs.values()))


def test_labels():
    assert labels_of("ij, jk", [2, 2]) == (["ij", "jk"], "ik")
    assert labels_of("ba", [2]) == (["ba"], "ab")
    assert labels_of("...i,...i->...", [3, 1]) == (["01i", "i"], "01")


def test_attention_needs_no_more_than_moves_and_products():
    assert check("ibnd,jbnd->bnij", [(4, 2, 3, 5), (6, 2, 3, 5)]) == [
        "relax.permute_dims",
        "relax.permute_dims",
        "relax.matmul",
    ]
    assert check("ibf,fnd->ibnd", [(4, 2, 6), (6, 3, 5)]) == [
        "relax.reshape",
        "relax.matmul",
        "relax.reshape",
    ]


def test_from_onnx_a_projection_is_quantized():
    weight = RNG.standard_normal((32, 4, 8)).astype(np.float32)
    node = helper.make_node("Einsum", ["x", "w"], ["y"], name="project", equation="ibh,hnd->ibnd")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, (16, 2, 32))],
        [value("y", TensorProto.FLOAT, (16, 2, 4, 8))],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    module = tvm_qfp8.compile(model, target="native")
    assert "project" in {layer.name for layer in module.report.layers if layer.operator == "matmul"}
    x = RNG.standard_normal((16, 2, 32)).astype(np.float32)
    found, expected = module.run({"x": x})[0], np.einsum("ibh,hnd->ibnd", x, weight)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
