"""Values whose shape is known only at run time: kernels have static shapes, so a program with one is refused."""

from __future__ import annotations

import tvm
from tvm import relax

from tvm_qfp8.errors import UnsupportedOperatorError
from tvm_qfp8.layer_names import layer_name
from tvm_qfp8.relay_passes.fuse import op_name, static_shape


def check_static_shapes(mod: tvm.IRModule) -> None:
    """Refuse tensors of unknown shape in a canonical program.

    Raises
    ------
    UnsupportedOperatorError
        Names the operator whose result has no static shape.
    """
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.var.ty, relax.TensorType) and static_shape(binding.var) is None:
                name = op_name(binding.value).removeprefix("relax.") or type(binding.value).__name__
                raise UnsupportedOperatorError(
                    f"the shape of {layer_name(binding.var)!r} (operator {name}) depends on the values of an input; "
                    "shapes are static: make that input a constant of the model, or cut the model before it"
                )
