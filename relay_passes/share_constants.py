"""Constants of equal bytes become one, in all functions of a module.

Packing gives every layer arrays of its own, also where layers share weights.
Before::

    lv = R.call_tir(cls.matmul, (x, metadata["ir.GenericConst"][0]))
    lv1 = R.call_tir(cls.matmul, (y, metadata["ir.GenericConst"][1]))

After::

    lv1 = R.call_tir(cls.matmul, (y, metadata["ir.GenericConst"][0]))
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.calibration.contents import Contents, contents


@tvm.transform.module_pass(opt_level=0, name="ShareConstants")
class ShareConstants:
    """Rewrite every Relax function."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        first: dict[Contents, GenericConst] = {}

        def share(constant: GenericConst, _mutator) -> GenericConst:
            return first.setdefault(contents(constant.value.numpy()), constant)

        for var, function in list(mod.functions_items()):
            if isinstance(function, relax.Function):
                mod[var] = tvm_ffi.structural_mutate(function, [(GenericConst, share)])
        return mod
