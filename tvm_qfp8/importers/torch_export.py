"""``torch.export`` programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers.finite_weights import check_finite
from tvm_qfp8.importers.imported import Imported
from tvm_qfp8.importers.relax_module import from_relax
from tvm_qfp8.importers.torch_recurrent import converters, decomposed, has_recurrent


def from_exported_program(program: Any, input_shapes: Mapping[str, tuple[int, ...]]) -> Imported:
    """An ``ExportedProgram``; dimensions that it leaves open are given by ``input_shapes``."""
    from torch.export import ExportedProgram
    from tvm.relax.frontend.torch import from_exported_program as convert

    if not isinstance(program, ExportedProgram):
        raise ModelError(
            f"a {type(program).__name__} is not an exported program; use torch.export.export(model.eval(), inputs)"
        )
    check_finite((name, _array(tensor)) for name, tensor in program.named_parameters())
    check_finite(((name, _array(tensor)) for name, tensor in program.named_buffers()), infinity_allowed=True)
    try:
        recurrent = has_recurrent(program)
        if recurrent:
            program = decomposed(program)
        mod = convert(
            program,
            run_ep_decomposition=not recurrent,
            keep_params_as_input=False,
            unwrap_unit_return_tuple=True,
            custom_convert_map={
                "elu.default": _elu,
                "amax.default": _amax,
                "native_group_norm.default": _group_norm,
                "fake_quantize.default": _fake_quantize,
                **converters(program),
            },
        )
    except UnsupportedOperatorError:
        raise
    except Exception as error:  # the front end raises whatever its converters do
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UnsupportedOperatorError(
            f"TVM cannot import the exported program: {reason}; replace that operator in the model and export again"
        ) from error
    return from_relax(mod, {}, input_shapes)


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


def _amax(node: Any, importer: Any) -> Any:
    """aten.amax(x, dim, keepdim), a part of logsumexp, which TVM's front end does not know."""
    from tvm import relax

    x, *given = importer.retrieve_args(node)
    axes = list(given[0]) if given and given[0] else None
    return importer.block_builder.emit(relax.op.max(x, axes, bool(given[1]) if len(given) > 1 else False))


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


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
