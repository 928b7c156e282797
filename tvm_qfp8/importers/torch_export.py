"""``torch.export`` programs."""

from __future__ import annotations

from typing import Any

import tvm

from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers.imported import Imported
from tvm_qfp8.importers.relax_module import from_relax


def from_exported_program(program: Any) -> Imported:
    """An ``ExportedProgram`` with static shapes."""
    from torch.export import ExportedProgram
    from tvm.relax.frontend.torch import from_exported_program as convert

    if not isinstance(program, ExportedProgram):
        raise ModelError(
            f"a {type(program).__name__} is not an exported program; use torch.export.export(model.eval(), inputs)"
        )
    try:
        mod = convert(program, keep_params_as_input=False, unwrap_unit_return_tuple=True)
    except (AssertionError, ValueError, NotImplementedError, KeyError, tvm.error.TVMError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UnsupportedOperatorError(
            f"TVM cannot import the exported program: {reason}; replace that operator in the model and export again"
        ) from error
    return from_relax(mod, {}, {})
