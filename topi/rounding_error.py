"""The squared error of rounding channels to a layout at given scales: the inner loop of ``bias_search``.

NumPy would take a dozen passes over the values. The arithmetic is that of ``format.round_to_grid``, in float32; errors
are summed in float64.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.float_contract import bind, mul, rounded_by, with_lanes
from tvm_qfp8.topi.prim_func import load, store

LANES = 16
"""Values that are rounded at once."""

_EXPONENT = 0x7F800000


def rounding_error() -> tirx.PrimFunc:
    """``main(top, binade, shift, magnitude, scale, error)`` for any layout.

    ``top`` float32 is the largest grid value, ``binade`` int32 the exponent bits of the first binade, whose step is 1,
    ``shift`` int32 what makes exponent bits those of the addend that rounds there. ``magnitude`` float32
    ``(channels, length)``, of a length that ``LANES`` divides, ``scale`` float32 and ``error`` float64 ``(channels,)``.
    """
    floats, ints, doubles = (with_lanes(dtype, LANES) for dtype in ("float32", "int32", "float64"))
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            top, binade, shift = (
                T.arg(name, tirx.Var(name, dtype))
                for name, dtype in (("top", "float32"), ("binade", "int32"), ("shift", "int32"))
            )
            channels, length = tirx.Var("channels", "int64"), tirx.Var("length", "int64")
            shapes = (
                ("magnitude", (channels, length), "float32"),
                ("scale", (channels,), "float32"),
                ("error", (channels,), "float64"),
            )
            # A symbolic offset, 0 when called, keeps LLVM from taking the arrays for aligned to whole vectors.
            magnitude, scale, error = (
                T.arg(
                    name,
                    T.buffer(shape, dtype, elem_offset=tirx.Var(f"{name}_offset", "int64"), offset_factor=1),
                )
                for name, shape, dtype in shapes
            )
            total = T.alloc_buffer((LANES,), "float64", scope="local", align=64)
            with T.serial(0, channels) as channel:
                factor = bind(tirx.const(1.0, "float32") / scale[channel])
                store(total, 0, tirx.const(0.0, doubles), LANES)
                with T.serial(0, length // LANES) as i:
                    value = bind(magnitude.vload([channel, i * LANES], floats))
                    scaled = bind(tirx.min(bind(mul(value, _spread(factor))), _spread(top)))
                    exponent = bind(tirx.reinterpret(ints, scaled) & tirx.const(_EXPONENT, ints))
                    exponent = bind(tirx.max(exponent, _spread(binade)) + _spread(shift))
                    addend = bind(tirx.reinterpret(floats, exponent))
                    rounded = bind(rounded_by(scaled, addend))
                    difference = bind(bind(mul(rounded, _spread(scale[channel]))) - value)
                    wide = bind(difference.astype(doubles))
                    store(total, 0, load(total, 0, LANES) + wide * wide, LANES)
                lanes = [load(total, lane, 1) for lane in range(LANES)]
                while len(lanes) > 1:
                    lanes = [bind(a + b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
                T.buffer_store(error, lanes[0], [channel])
    return builder.get()


def _spread(value):
    return tirx.Broadcast(value, LANES)
