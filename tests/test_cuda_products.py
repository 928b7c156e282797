"""Products of two activations on tensor cores: run by the emulator, and, with a GPU, on it."""

import numpy as np
import pytest
from cuda_emulator import run_kernel
from test_cuda import NEEDS_COMPILER, NEEDS_GPU, kernel_of, on_gpu, random_codes

from tvm_qfp8.format import decode_grid, get_layout
from tvm_qfp8.topi.batch_matmul import BatchMatmulShape, Product
from tvm_qfp8.topi.cuda.batch_matmul import emit_batch_matmul, exact_steps_of_any

# batch, rows, columns, depth, layouts, and if the right operand is transposed
PRODUCTS = {
    "queries and keys": (3, 33, 20, 32, "E2M5", "E2M5", True),
    "shares and values": (2, 17, 40, 64, "UE3M5", "E2M5", False),
    "odd depth": (2, 5, 9, 77, "UE3M5", "E2M5", False),
    "odd depth, transposed": (2, 20, 7, 29, "E3M4", "E2M5", True),
    "words, no whole step": (1, 16, 64, 300, "E2M5", "E2M5", True),
    "one of each": (1, 1, 1, 1, "E2M5", "E1M6", False),
    "tiles for many warps": (70, 33, 68, 20, "E2M5", "E2M5", True),
    "no exact step": (1, 3, 5, 20, "E3M4", "E3M4", False),
}
INSIDE = {name: PRODUCTS[name] for name in ("queries and keys", "shares and values", "no exact step")}


def product_kernel(
    batch, rows, columns, depth, x_layout, y_layout, transpose_y, heads=1, inside=(False, False)
):
    """(function, x, y, expected sums)"""
    rng = np.random.default_rng(4)
    layouts = get_layout(x_layout), get_layout(y_layout)
    shape = BatchMatmulShape(batch, rows, columns, depth, *layouts, transpose_y)
    x = random_codes(rng, (batch, rows, depth), x_layout)
    y = random_codes(rng, (batch, columns, depth) if transpose_y else (batch, depth, columns), y_layout)
    left, right = (
        decode_grid(codes, layout).astype(np.int64) for codes, layout in zip((x, y), layouts, strict=True)
    )
    sums = left @ (right.transpose(0, 2, 1) if transpose_y else right)
    x, y = (swapped(codes, heads) if own else codes for codes, own in zip((x, y), inside, strict=True))
    product = Product(shape, heads, *inside)
    function = kernel_of(lambda *a: emit_batch_matmul(product, *a), x, y, columns, batch * rows)
    return function, x, y, sums.astype(np.float32).reshape(batch * rows, columns)


def swapped(codes, heads):
    """(batch * heads, lines, values) as (batch, lines, heads, values)."""
    return np.ascontiguousarray(codes.reshape(-1, heads, *codes.shape[1:]).swapaxes(1, 2))


@NEEDS_COMPILER
@pytest.mark.parametrize("inside", [(True, True), (False, True)])
@pytest.mark.parametrize("name", INSIDE)
def test_heads_that_lie_inside(name, inside, tmp_path):
    batch, *rest = INSIDE[name]
    function, x, y, expected = product_kernel(2 * batch, *rest, heads=2, inside=inside)
    found = np.full(expected.shape, np.nan, np.float32)
    run_kernel(function, [x, y, found], tmp_path)
    np.testing.assert_array_equal(found, expected)


@NEEDS_COMPILER
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_activations(name, tmp_path):
    function, x, y, expected = product_kernel(*PRODUCTS[name])
    found = np.full(expected.shape, np.nan, np.float32)
    run_kernel(function, [x, y, found], tmp_path)
    np.testing.assert_array_equal(found, expected)


def test_steps_that_are_exact_whatever_the_codes():
    """252 * 252, 4032 * 252 and 1984 * 1984 are the largest products."""

    def steps(x, y, depth=64):
        return exact_steps_of_any(BatchMatmulShape(1, 8, 8, depth, get_layout(x), get_layout(y), False))

    assert [steps("E2M5", "E2M5"), steps("UE3M5", "E2M5"), steps("E3M4", "E3M4")] == [16, 1, 0]
    assert steps("UE3M5", "E2M5", 2112) == 1 and steps("UE3M5", "E2M5", 2114) == 0


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_activations_on_a_gpu(name):
    function, x, y, expected = product_kernel(*PRODUCTS[name])
    np.testing.assert_array_equal(on_gpu(function, x, y, expected.shape), expected)
