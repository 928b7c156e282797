"""Converters of single ``torch.export`` operators that TVM's front end does not have, or has wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def _elu(node: Any, importer: Any) -> Any:
    """aten.elu(x, alpha, scale, input_scale): TVM's own converter leaves out both scales, so SELU comes out wrong."""
    from tvm import relax

    x, *given = importer.retrieve_args(node)
    alpha, scale, input_scale = (float(value) for value in (*given, 1.0, 1.0, 1.0)[:3])

    def emit(function: Any, *arguments: Any) -> Any:
        operands = [relax.const(a, str(x.ty.dtype)) if isinstance(a, float) else a for a in arguments]
        return importer.block_builder.emit(function(*operands))

    below = emit(relax.op.multiply, emit(relax.op.minimum, x, 0.0), input_scale)
    curve = emit(relax.op.multiply, emit(relax.op.subtract, emit(relax.op.exp, below), 1.0), alpha * scale)
    return emit(relax.op.add, emit(relax.op.multiply, emit(relax.op.maximum, x, 0.0), scale), curve)


def _reduction(name: str) -> Callable:
    """aten.amax, amin or prod(x, dim, keepdim), which TVM's front end does not know."""

    def convert(node: Any, importer: Any) -> Any:
        from tvm import relax

        x, *given = importer.retrieve_args(node)
        axes = given[0] if given else None
        axes = [axes] if isinstance(axes, int) else list(axes or ()) or None
        keep = bool(given[1]) if len(given) > 1 else bool(node.kwargs.get("keepdim", False))
        return importer.block_builder.emit(getattr(relax.op, name)(x, axes, keep))

    return convert


def _grid_sampler(node: Any, importer: Any) -> Any:
    """aten.grid_sampler_2d(x, grid, mode, padding, align_corners): TVM wants the two coordinates before the pixels."""
    from tvm import relax

    x, grid, mode, padding, corners = importer.retrieve_args(node)
    coordinates = importer.block_builder.emit(relax.op.permute_dims(grid, [0, 3, 1, 2]))
    call = relax.op.image.grid_sample(
        x,
        coordinates,
        method=("bilinear", "nearest", "bicubic")[mode],
        layout="NCHW",
        padding_mode=("zeros", "border", "reflection")[padding],
        align_corners=corners,
    )
    return importer.block_builder.emit(call)


def _scatter_add(node: Any, importer: Any) -> Any:
    """aten.scatter_add(x, dim, index, src)."""
    from tvm import relax

    x, dim, index, source = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.scatter_elements(x, index, source, dim, "add"))


def _scatter_reduce(node: Any, importer: Any) -> Any:
    """aten.scatter_reduce(x, dim, index, src, reduce, include_self)."""
    from tvm import relax

    x, dim, index, source, reduce, *given = importer.retrieve_args(node)
    reductions = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if (
        reduce not in reductions
        or not {"include_self": True, **node.kwargs}["include_self"]
        or False in given
    ):
        raise NotImplementedError(
            f"scatter_reduce of {reduce} that leaves out what is there is not supported"
        )
    call = relax.op.scatter_elements(x, index, source, dim, reductions[reduce])
    return importer.block_builder.emit(call)


def _variance(node: Any, importer: Any) -> Any:
    """aten.var(x, dim, correction, keepdim): TVM wants the dimensions that torch lets one leave out."""
    from tvm import relax

    x, *given = importer.retrieve_args(node)
    rank = len(x.ty.shape)
    axes = [given[0]] if given and isinstance(given[0], int) else list(given[0] or ()) if given else []
    axes = axes or list(range(rank))
    correction = node.kwargs.get("correction")
    correction = 1 if correction is None else correction
    emit = importer.block_builder.emit
    variance = emit(relax.op.variance(x, axes, bool(node.kwargs.get("keepdim", False))))
    count = math.prod(int(x.ty.shape[axis]) for axis in axes)
    if not correction:
        return variance
    return emit(relax.op.multiply(variance, relax.const(count / (count - correction), str(x.ty.dtype))))


def _antialiased(node: Any, importer: Any) -> Any:
    raise NotImplementedError("antialiased interpolation is not supported")


def _group_norm(node: Any, importer: Any) -> Any:
    """aten.native_group_norm(x, weight, bias, N, C, HxW, groups, epsilon): TVM's own fails without weight and bias."""
    from tvm import relax

    x, weight, bias, _, channels, _, groups, epsilon = importer.retrieve_args(node)
    dtype = str(x.ty.dtype)
    ones, zeros = (relax.const(np.full(int(channels), value), dtype) for value in (1.0, 0.0))
    call = relax.op.nn.group_norm(
        x,
        ones if weight is None else weight,
        zeros if bias is None else bias,
        num_groups=int(groups),
        channel_axis=1,
        axes=list(range(2, len(x.ty.shape))),
        epsilon=float(epsilon),
    )
    return importer.block_builder.emit(call)


def _fake_quantize(node: Any, importer: Any) -> Any:
    """tvm_qfp8.fake_quantize(x, scale, layout, axis), from quantization-aware training."""
    from tvm_qfp8.relay_passes import qfp8_ops

    return importer.block_builder.emit(qfp8_ops.fake_quantize(*importer.retrieve_args(node)))


CONVERTERS: dict[str, Callable] = {
    "_upsample_bilinear2d_aa.default": _antialiased,
    "amax.default": _reduction("max"),
    "amin.default": _reduction("min"),
    "elu.default": _elu,
    "fake_quantize.default": _fake_quantize,
    "grid_sampler_2d.default": _grid_sampler,
    "native_group_norm.default": _group_norm,
    "prod.dim_int": _reduction("prod"),
    "scatter_add.default": _scatter_add,
    "scatter_reduce.two": _scatter_reduce,
    "var.correction": _variance,
}


def known_operators() -> set[str]:
    """What has a converter, here or in TVM."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return {*ExportedProgramImporter().create_convert_map(), *CONVERTERS}
