"""For GPUs: inputs are copied first, so that one graph holds all kernels but these copies.

Kernels that read a caller's memory cannot be part of a captured graph, and cut it in two. Before::

    lv = R.call_tir(cls.less, (input_ids, ...), ...)
    lv1 = R.call_tir(cls.where, (lv, input_ids, ...), ...)

After::

    copies = R.call_tir(cls.copy_inputs, (input_ids, attention_mask), ...)
    lv = R.call_tir(cls.less, (copies[0], ...), ...)
    lv1 = R.call_tir(cls.where, (lv, copies[0], ...), ...)
"""

from __future__ import annotations

import math

import tvm
from tvm import relax, tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.relay_passes.fuse import shape_of, static_shape
from tvm_qfp8.relay_passes.rewriter import MainRewriter
from tvm_qfp8.topi.cuda.launch import for_each
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store


@tvm.transform.module_pass(opt_level=0, name="CopyInputs")
class CopyInputs:
    """Copy several inputs, by one kernel, where several kernels read them."""

    def transform_module(self, mod: tvm.IRModule, _ctx) -> tvm.IRModule:
        return _Rewriter(mod).rewrite()


class _Rewriter(MainRewriter):
    def body(self) -> None:
        inputs = [p for p in self.main.params if 0 not in (static_shape(p) or (0,))]
        # Those that read the only input come first, and cut nothing.
        if len(inputs) > 1 and len({r for parameter in inputs for r in self.readers[parameter]}) > 1:
            self._copy(inputs)
        super().body()

    def _copy(self, inputs: list[relax.Var]) -> None:
        specs = [TensorSpec(shape_of(p), str(p.ty.dtype)) for p in inputs]
        function = self.builder.add_func(copy_prim_func(specs).without_attr("global_symbol"), "copy_inputs")
        arguments = [self.variables[p] for p in inputs]
        types = [argument.ty for argument in arguments]
        copies = self.builder.emit(relax.call_tir(function, arguments, types))
        for index, parameter in enumerate(inputs):
            self.variables[parameter] = self.builder.emit(relax.TupleGetItem(copies, index))


def copy_prim_func(specs: list[TensorSpec]) -> tirx.PrimFunc:
    """``(sources ..., targets ...) -> None``."""

    def body(*buffers) -> None:
        count = max(math.prod(spec.shape) for spec in specs)

        def one(index) -> None:
            for source, target, spec in zip(buffers, buffers[len(specs) :], specs, strict=False):
                with T.If(index < math.prod(spec.shape)):
                    with T.Then():
                        store(target, index, load(source, index, 1), 1)

        for_each(count, one)

    return build_prim_func("copy_inputs", [*specs, *specs], body)
