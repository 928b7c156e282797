"""Relax modules: bind parameters, check that shapes are static."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.sym import Analyzer

from tvm_qfp8.errors import ModelError
from tvm_qfp8.importers.finite_weights import check_finite
from tvm_qfp8.importers.imported import Imported, result_types


def from_relax(
    mod: tvm.IRModule, params: Mapping[str, np.ndarray | float], input_shapes: Mapping[str, tuple[int, ...]]
) -> Imported:
    """A Relax module with ``main``; ``params`` are bound by name, open dimensions by ``input_shapes``."""
    if "main" not in [var.name_hint for var in mod.get_global_vars()]:
        functions = ", ".join(var.name_hint for var in mod.get_global_vars())
        raise ModelError(
            f"the Relax module has no function 'main' (it has {functions}); rename the entry function"
        )
    main = mod["main"]
    names = [p.name for p in main.params]
    unknown = [name for name in (*params, *input_shapes) if name not in names]
    if unknown:
        raise ModelError(f"'main' has no parameter {unknown[0]!r}; it has {', '.join(names)}")
    if params:
        check_finite((name, np.asarray(value)) for name, value in params.items())
        mod = relax.transform.BindParams("main", {k: np.asarray(v) for k, v in params.items()})(mod)
    symbols: dict = {}
    for p in mod["main"].params:
        if p.name in input_shapes:
            for own, given in zip(p.ty.shape, input_shapes[p.name], strict=True):
                if isinstance(own, relax.Var) or not hasattr(own, "value"):
                    symbols[own] = int(given)
    if symbols:
        mod = relax.transform.BindSymbolicVars(symbols, "main")(mod)
        mod["main"] = _with_numbers(mod["main"])
    for p in mod["main"].params:
        dims = list(p.ty.shape or [])
        if not all(hasattr(extent, "value") for extent in dims):
            raise ModelError(
                f"input {p.name!r} has open dimensions {dims}; give input_shapes={{{p.name!r}: (...)}}"
            )
    outputs = [f"output{index}" for index, _ in enumerate(result_types(mod))]
    return Imported(mod, [p.name for p in mod["main"].params], outputs)


def _with_numbers(function: relax.Function) -> relax.Function:
    """What open dimensions were computed to, such as ``1 + 16`` for ``1 + n``, as numbers."""
    analyzer = Analyzer()
    arithmetic = (tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max)
    return tvm_ffi.structural_map(function, (arithmetic, analyzer.simplify))
