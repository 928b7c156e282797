"""The Relax operators of a quantized program.

They carry QFP8 tensors by their own data types, so that a printed program shows what is stored how::

    lv: R.Tensor((1, 56, 56, 64), "custom[qfp8_ue2m6]8") = R.qfp8.encode(x, layout="UE2M6", scale=0.012)
    lv1: R.Tensor((1, 56, 56, 24), "float32") = R.qfp8.conv2d(lv, w, a, bias, strides=[1, 1], ...)

==================  =========================================  ==================================================
operator            arguments                                  result
==================  =========================================  ==================================================
qfp8.encode         x float32 [, r ``(channels,)``]            codes of ``layout``; r = fl32(1 / scale)
qfp8.decode         codes                                      float32: fl32(grid value * scale)
qfp8.encode_rows    x float32, factors ``(channels,)``         (codes, scale of each row); ``topi.encode_rows``
qfp8.encode_samples x float32 ``(batch, ...)``                 (codes, scale of each sample)
qfp8.matmul         x codes, w codes ``(out, in)``, a, bias    float32: fl32(fl32(acc) * a[c]) + bias[c]
..                  [, row scales]                             float32: fl32(fl32(fl32(acc) * a[c]) * s[r]) + bias[c]
qfp8.conv2d         x codes NHWC, w codes OHWI, a, bias        the same, s of pixels or of samples
..                  [, scales]
qfp8.batch_matmul   x codes, y codes (both activations)        float32: fl32(acc) * scale, then times the scales
..                  [, x scales] [, y scales]                  of x's rows or samples, then of y's samples
qfp8.take           table codes ``(rows, width)``, scale       float32: rows of an embedding table, each with its
                    ``(rows,)``, indices                       own scale
qfp8.interpolate    x float32                                  float32: the table of ``function`` at ``max_error``
qfp8.halve          x float32                                 float32: x rounded to float16, which takes 65504 at
                                                              most, or bfloat16 (``halve_traffic``)
qfp8.recurrent      inputs float32, weight, a, bias, ...       float32: outputs of all steps and the last states
qfp8.fake_quantize  x float32, scale                           x rounded to ``layout``; ``ClaimTrained`` takes it
qfp8.trained        a linear layer's result, weight scales     the same: how the layer was trained (``trained``)
qfp8.batchnorm_input  x float32, number, axis            x: what BatchNorm layer ``number`` receives
qfp8.l2_normalize   x float32, floor                           float32: x / max(|x|, floor) over the last axis
qfp8.mish, selu     x float32                                  float32; until ``Interpolate`` only
qfp8.elu, celu      x float32, alpha                           the same
==================  =========================================  ==================================================

Where only weights are quantized x is float32, and where a layer is left out its weight is float32 as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import ir, relax

from tvm_qfp8 import dtype as _dtype  # noqa: F401  (registers the data types)
from tvm_qfp8.format import Layout, get_layout
from tvm_qfp8.recurrent_cell import Cell


def _encode_type(call, _builder):
    return relax.TensorType(call.args[0].ty.shape, get_layout(str(call.attrs["layout"])).ir_dtype)


def _decode_type(call, _builder):
    return relax.TensorType(call.args[0].ty.shape, "float32")


def _encode_rows_type(call, _builder):
    shape = list(call.args[0].ty.shape)
    codes = relax.TensorType(shape, get_layout(str(call.attrs["layout"])).ir_dtype)
    return relax.TupleType([codes, relax.TensorType(shape[:-1], "float32")])


def _encode_samples_type(call, _builder):
    shape = list(call.args[0].ty.shape)
    codes = relax.TensorType(shape, get_layout(str(call.attrs["layout"])).ir_dtype)
    return relax.TupleType([codes, relax.TensorType(shape[:1], "float32")])


def _same_type(call, _builder):
    return call.args[0].ty


def _matmul_type(call, _builder):
    shape = list(call.args[0].ty.shape)
    return relax.TensorType([*shape[:-1], call.args[1].ty.shape[0]], "float32")


def _conv2d_type(call, _builder):
    batch, height, width, channels = (int(extent) for extent in call.args[0].ty.shape)
    if bool(call.attrs["channels_first"]):
        height, width = width, channels
    out_channels, kernel_h, kernel_w, _ = (int(extent) for extent in call.args[1].ty.shape)
    top, left, bottom, right = (int(p) for p in call.attrs["padding"])
    strides = [int(s) for s in call.attrs["strides"]]
    dilation = [int(d) for d in call.attrs["dilation"]]
    spread = [int(d) for d in call.attrs["input_dilation"]]
    height, width = (height - 1) * spread[0] + 1, (width - 1) * spread[1] + 1
    out_h = (height + top + bottom - dilation[0] * (kernel_h - 1) - 1) // strides[0] + 1
    out_w = (width + left + right - dilation[1] * (kernel_w - 1) - 1) // strides[1] + 1
    return relax.TensorType([batch, out_h, out_w, out_channels], "float32")


HEADS_INSIDE = ("x_heads_inside", "y_heads_inside", "result_heads_inside")
"""Attributes of a product of two activations."""


def _batch_matmul_type(call, _builder):
    x, y = logical_shapes(call)
    shape = [*x[:-1], y[-2] if bool(call.attrs["transpose_y"]) else y[-1]]
    if bool(call.attrs["result_heads_inside"]):
        shape[1], shape[2] = shape[2], shape[1]
    return relax.TensorType(shape, "float32")


def logical_shapes(call) -> list[list]:
    """Shapes of a product's operands with heads, where they lie inside, among the batches."""
    found = []
    for argument, inside in zip(call.args[:2], HEADS_INSIDE[:2], strict=True):
        shape = list(argument.ty.shape)
        if bool(call.attrs[inside]):
            shape[1], shape[2] = shape[2], shape[1]
        found.append(shape)
    return found


def _take_type(call, _builder):
    table, _, indices = call.args
    return relax.TensorType([*indices.ty.shape, table.ty.shape[1]], "float32")


def _recurrent_type(call, _builder):
    inputs, hidden = list(call.args[0].ty.shape), call.args[5].ty
    states = 2 if str(call.attrs["kind"]) == "LSTM" else 1
    outputs = relax.TensorType([*inputs[:2], hidden.shape[1]], "float32")
    return relax.TupleType([outputs, *[hidden] * states])


def _look_up_type(call, _builder):
    return relax.TensorType(call.args[0].ty.shape, call.args[1].ty.dtype)


_OPERATORS = {
    "recurrent": _recurrent_type,
    "look_up": _look_up_type,
    "encode": _encode_type,
    "decode": _decode_type,
    "encode_rows": _encode_rows_type,
    "encode_samples": _encode_samples_type,
    "matmul": _matmul_type,
    "conv2d": _conv2d_type,
    "batch_matmul": _batch_matmul_type,
    "take": _take_type,
    "interpolate": _same_type,
    **dict.fromkeys(
        (
            "halve",
            "l2_normalize",
            "fake_quantize",
            "trained",
            "batchnorm_input",
            "mish",
            "selu",
            "elu",
            "celu",
        ),
        _same_type,
    ),
}


def _register() -> None:
    known = {str(name) for name in ir._ffi_api.ListOpNames()}
    for name, infer_type in _OPERATORS.items():
        full = f"relax.qfp8.{name}"
        if full in known:
            continue
        ir._ffi_api.RegisterOp(full, f"QFP8 {name}.")
        ir.register_op_attr(full, "FInferType", infer_type)
        ir.register_op_attr(full, "FPurity", True)


_register()


def _call(name: str, args: list, **attrs) -> relax.Call:
    return relax.Call(ir.Op.get(f"relax.qfp8.{name}"), args, tvm.ir.make_node("ir.DictAttrs", **attrs))


def encode(x, layout: Layout, scale: float, reciprocals=None) -> relax.Call:
    """Codes of ``x`` with one scale for the whole tensor, or with the ``reciprocals`` of a scale for each channel."""
    return _call(
        "encode", [x] if reciprocals is None else [x, reciprocals], layout=layout.name, scale=float(scale)
    )


def decode(codes, scale: float) -> relax.Call:
    """The values of codes that have one scale."""
    return _call("decode", [codes], scale=float(scale))


def halve(x, dtype: str) -> relax.Call:
    """``x`` rounded to the nearest float16, magnitudes being 65504 at most, or bfloat16; as float32."""
    return _call("halve", [x], dtype=dtype)


def l2_normalize(x, floor: float, axis: int = -1) -> relax.Call:
    """``x`` divided by its length over an axis, or by ``floor`` where that is larger."""
    return _call("l2_normalize", [x, tvm.tirx.FloatImm("float32", floor), tvm.tirx.IntImm("int64", axis)])


def encode_rows(x, factors, layout: Layout, rotation: int = 1) -> relax.Call:
    """Codes of ``x`` and the scale of each row, as a tuple.

    Channels are multiplied by ``factors`` before, and rotated by a matrix of the order ``rotation``
    (``topi/rotation.py``).
    """
    return _call("encode_rows", [x, factors], layout=layout.name, rotation=rotation)


def encode_samples(x, layout: Layout) -> relax.Call:
    """Codes of ``x (batch, ...)`` and the scale of each sample, as a tuple."""
    return _call("encode_samples", [x], layout=layout.name)


def matmul(x, weight, a, bias, row_scales=None) -> relax.Call:
    """``x`` codes ``(..., in)`` times ``weight`` codes ``(out, in)``; ``a`` and ``bias`` float32 ``(out,)``.

    ``row_scales`` float32 ``(...,)`` where each row of ``x`` has its own.
    """
    return _call("matmul", [x, weight, a, bias, *([] if row_scales is None else [row_scales])])


def conv2d(
    x,
    weight,
    a,
    bias,
    *,
    strides,
    padding,
    dilation,
    groups: int,
    input_dilation=(1, 1),
    channels_first: bool = False,
    scales=None,
) -> relax.Call:
    """NHWC convolution by OHWI weights; ``input_dilation`` puts zeros between pixels (transposed convolution).

    ``channels_first``: ``x`` is NCHW, as images enter a network; the result is NHWC. ``scales`` float32
    ``(batch,)`` where each sample of ``x`` has its own, ``(batch, height, width)`` where each pixel has and makes one
    of the result.
    """
    return _call(
        "conv2d",
        [x, weight, a, bias, *([] if scales is None else [scales])],
        strides=list(strides),
        padding=list(padding),
        dilation=list(dilation),
        groups=int(groups),
        input_dilation=list(input_dilation),
        channels_first=channels_first,
    )


def batch_matmul(
    x,
    y,
    scale: float,
    *,
    transpose_y: bool,
    heads_inside: tuple[bool, bool, bool] = (False, False, False),
    x_scales=None,
    y_scales=None,
) -> relax.Call:
    """``x (..., m, k)`` by ``y (..., k, n)``, or by ``(..., n, k)`` transposed, times ``scale``.

    x with ``heads_inside`` is ``(batch, m, heads, k)`` instead of ``(batch, heads, m, k)``; likewise y and the result.
    ``x_scales`` are those of its rows, in its own order, or ``(batch,)``; ``y_scales`` are ``(batch,)``.
    """
    inside = dict(zip(HEADS_INSIDE, heads_inside, strict=True))
    scales = [found for found in (x_scales, y_scales) if found is not None]
    has = {"has_x_scales": x_scales is not None, "has_y_scales": y_scales is not None}
    return _call(
        "batch_matmul", [x, y, *scales], scale=float(scale), transpose_y=transpose_y, **has, **inside
    )


def product_scales(call) -> tuple:
    """The scales of x and of y among a product's arguments, None where they are in its ``scale``."""
    scales = list(call.args[2:])
    x_scales = scales.pop(0) if bool(call.attrs["has_x_scales"]) else None
    return x_scales, scales.pop(0) if bool(call.attrs["has_y_scales"]) else None


def take(table, scale, indices) -> relax.Call:
    """Rows ``indices`` of an embedding table of codes."""
    return _call("take", [table, scale, indices])


def recurrent(
    arguments: Sequence, cell: Cell, *, reverse: bool, layout: str = "", scale: float = 0.0
) -> relax.Call:
    """One direction of a recurrent layer: the loop over time, from the last step to the first where ``reverse``.

    Parameters
    ----------
    arguments : sequence of expressions
        ``inputs`` float32 ``(steps, batch, gates * hidden)``, the input's product with its bias; ``weight``
        ``(gates * hidden, hidden)``, float32 or codes, of the product with the hidden state; its ``a`` and ``bias``,
        float32 ``(gates * hidden,)``; ``lengths`` int32 ``(batch,)``, the steps that each sequence has; the first
        hidden and, for LSTM, cell state, float32 ``(batch, hidden)``; where the cell has peepholes their weights,
        float32 ``(3 * hidden,)``.
    layout, scale : str, float
        Of the hidden state as the product reads it; no layout where it stays float32.

    Returns
    -------
    A call whose value is a tuple: outputs ``(steps, batch, hidden)``, 0 after a sequence's end, and the last states.
    """
    attributes = {**cell.attributes(), "reverse": bool(reverse), "layout": layout, "scale": float(scale)}
    return _call("recurrent", list(arguments), **attributes)


def fake_quantize(x, scale, layout: str, axis: int) -> relax.Call:
    """``x`` rounded to a layout, with a scale for each index of ``axis``, or one for all if it is -1."""
    return _call("fake_quantize", [x, scale], layout=layout, axis=int(axis))


def trained(
    y, weight_scale, weight_layout: str, activation_layout: str, activation_scale: float
) -> relax.Call:
    """``y`` of a linear layer that was trained so; no activation layout where only its weight is quantized."""
    return _call(
        "trained",
        [y, weight_scale],
        weight_layout=weight_layout,
        activation_layout=activation_layout,
        activation_scale=float(activation_scale),
    )


def batchnorm_input(x, number: int, axis: int) -> relax.Call:
    """``x`` with channels on ``axis``, as BatchNorm layer ``number`` receives it (``batchnorm_marks``)."""
    return _call("batchnorm_input", [x, *(tvm.tirx.IntImm("int64", value) for value in (number, axis))])


def activation(name: str, x, *parameters: float) -> relax.Call:
    """Mish, SELU, ELU or CELU of a canonical program, where Relax has no operator; ELU and CELU take alpha."""
    return _call(name, [x, *(tvm.tirx.FloatImm("float32", value) for value in parameters)])


def look_up(codes, table) -> relax.Call:
    """``table[codes]``; the table has 256 float32 values, or 256 codes of a QFP8 data type."""
    return _call("look_up", [codes, table])


def interpolate(x, function: str, max_error: float) -> relax.Call:
    """``function(x)`` by its table."""
    return _call("interpolate", [x], function=function, max_error=float(max_error))
