"""For GPUs: a norm's kernel encodes its rows, too, where a dense layer reads them with a scale for each row.

The threads of a row have its values at hand. Before::

    normed = R.nn.layer_norm(x, gamma, beta)                 # Group
    encoded = R.qfp8.encode_rows(normed, factors)            # Single

After: the group has ``encode_rows``, its kernel the outputs ``normed``, codes and scales.
"""

from __future__ import annotations

from tvm import relax, tirx

from tvm_qfp8.format import get_layout
from tvm_qfp8.relay_passes.cuda_kernels import emit_rows
from tvm_qfp8.relay_passes.fuse import Group, Single, normalized_axis, op_name, shape_of
from tvm_qfp8.relay_passes.operands import Emitter, Operands, array_of
from tvm_qfp8.topi.cuda.isa import INSTRUCTION_SET
from tvm_qfp8.topi.encode_rows import scaled_reader, store_encoded_row
from tvm_qfp8.topi.prim_func import TensorSpec


def with_encoded_rows(steps: list[Group | Single]) -> list[Group | Single]:
    """Let encodes with a scale for each row join the norms whose results they read."""
    norm_of = {
        var: step
        for step in steps
        if isinstance(step, Group) and is_norm_of_rows(step.anchor)
        for var in step.outputs
    }
    kept: list[Group | Single] = []
    for step in steps:
        if isinstance(step, Single) and op_name(step.value) == "relax.qfp8.encode_rows":
            group = norm_of.get(step.value.args[0])
            if group is not None and group.encode_rows is None:
                group.encode_rows = step.var, step.value
                continue
        kept.append(step)
    return kept


def is_norm_of_rows(call: relax.Call) -> bool:
    """LayerNorm or RMSNorm over the last axis."""
    norm = op_name(call) in ("relax.nn.layer_norm", "relax.nn.rms_norm")
    return norm and normalized_axis(call) == len(shape_of(call.args[0])) - 1


class EncodedRows:
    """The encode of what a norm's kernel stores, in the same kernel."""

    def __init__(self, call, operands: Operands) -> None:
        self.layout = get_layout(str(call.attrs["layout"]))
        self.shape, self.source = shape_of(call.args[0]), call.args[0]
        self._factors = operands.constant(array_of(call.args[1]))
        self.outputs = [TensorSpec(self.shape, "uint8"), TensorSpec(self.shape[:-1], "float32")]
        self.buffers: tuple = ()
        """Inputs, the source as stored, codes, scales; known when the kernel is written."""

    def emit(self, row, index) -> None:
        """Encode one row."""
        inputs, source, codes, scales = self.buffers
        read = scaled_reader(source, inputs[self._factors], self.shape[-1])
        values = row.again(lambda offset, lanes: read(index, offset, lanes))
        magnitudes = values.mapped(tirx.abs)
        store_encoded_row(values, magnitudes, index, self.layout, INSTRUCTION_SET, codes, scales)


def norm_with_encoded_rows(
    anchor, encode, operands: Operands, max_error: float
) -> tuple[Emitter, EncodedRows]:
    """The kernel of a norm over rows that encodes them, too."""
    encoded = EncodedRows(encode, operands)
    body, described = emit_rows(anchor, INSTRUCTION_SET, operands, max_error, encoded.emit)
    return (body, (described, "encode_rows", encoded.layout)), encoded
