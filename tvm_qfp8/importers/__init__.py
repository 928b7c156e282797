"""Importers: an ONNX file or model, an exported torch program or a Relax module becomes one Relax program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.errors import ModelError
from tvm_qfp8.importers.imported import Imported
from tvm_qfp8.importers.relax_module import from_relax

__all__ = ["Imported", "load_model"]


def load_model(
    mod: Any,
    params: Mapping[str, np.ndarray] | None = None,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Imported:
    """Import a model.

    Parameters
    ----------
    mod : Relax IRModule, onnx.ModelProto, path to an .onnx file, or torch.export.ExportedProgram
    params : dict of name to array
        Values of a Relax module's parameters.
    input_shapes : dict of name to shape
        For inputs whose dimensions the model leaves open.

    Raises
    ------
    ModelError
        The file is missing or damaged, a dimension is open, a weight is not finite, or the kind of model is unknown.
    UnsupportedOperatorError
        The importer does not know an operator.
    """
    if isinstance(mod, tvm.IRModule):
        return from_relax(mod, params or {}, input_shapes or {})
    if isinstance(mod, str | os.PathLike):
        path = Path(mod)
        if path.suffix.lower() != ".onnx":
            raise ModelError(
                f"{path} is not an .onnx file; models are .onnx files, exported programs or Relax modules"
            )
        from tvm_qfp8.importers.onnx_model import from_onnx_path

        return from_onnx_path(path, input_shapes or {})
    kind = type(mod).__module__.split(".")[0]
    if kind == "onnx":
        from tvm_qfp8.importers.onnx_model import from_onnx_model

        return from_onnx_model(mod, input_shapes or {})
    if kind == "torch":
        from tvm_qfp8.importers.torch_export import from_exported_program

        return from_exported_program(mod, input_shapes or {})
    raise ModelError(
        f"a model of type {type(mod).__name__} is not known; give an .onnx path, onnx.ModelProto, "
        "torch.export.ExportedProgram or Relax IRModule"
    )
