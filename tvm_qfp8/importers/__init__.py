"""Importers: an ONNX file or model, an exported torch program or a Relax module becomes one Relax program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tvm

from tvm_qfp8.errors import ModelError
from tvm_qfp8.importers.imported import Imported, result_types
from tvm_qfp8.importers.open_batch import check_batch, close_batch
from tvm_qfp8.importers.open_length import Extent, Shapes, ShapesAtLength, open_length
from tvm_qfp8.importers.relax_module import from_relax

__all__ = ["Extent", "Imported", "Shapes", "load_model"]


def load_model(
    mod: Any,
    params: Mapping[str, np.ndarray | float] | None = None,
    input_shapes: Shapes | None = None,
) -> Imported:
    """Import a model.

    Parameters
    ----------
    mod : Relax IRModule, onnx.ModelProto, path to an .onnx file, or torch.export.ExportedProgram
    params : dict of name to array
        Values of inputs that become constants. For an ONNX model's a number stands for every element.
    input_shapes : dict of name to shape
        For inputs whose dimensions the model leaves open. A name instead of the first extent leaves the batch open, as
        an ONNX file does without this argument if it opens the batch only; of a list of lengths the longest is taken.

    Raises
    ------
    ModelError
        The file is missing or damaged, a dimension is open, a weight is not finite, or the kind of model is unknown.
    UnsupportedOperatorError
        The importer does not know an operator.
    """
    length = open_length(input_shapes or {})
    if length is None:
        given = cast(ShapesAtLength, input_shapes or {})
    else:
        given = length.shapes_at(input_shapes or {}, length.lengths[-1])
    shapes, batch = close_batch(given)
    imported = _load(mod, params or {}, shapes)
    imported.length = None if length is None else length.of_inputs(imported.input_names)
    parameters = [parameter.ty for parameter in imported.mod["main"].params]
    if imported.batch is not None:
        batch = imported.batch
        given = {
            name: (batch, *shape[1:]) for name, shape in _extents(imported.input_names, parameters).items()
        }
        imported.notes.append(f"the batch {batch!r} is open: any number of samples run one after the other")
    if batch is not None:
        check_batch(
            batch,
            given,
            _extents(imported.input_names, parameters),
            _extents(imported.output_names, result_types(imported.mod)),
        )
        imported.batch = batch
    return imported


def _extents(names: Sequence[str], types: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(int(extent) for extent in type_.shape) for name, type_ in zip(names, types, strict=True)
    }


def _load(
    mod: Any, params: Mapping[str, np.ndarray | float], input_shapes: Mapping[str, tuple[int, ...]]
) -> Imported:
    if isinstance(mod, tvm.IRModule):
        return from_relax(mod, params, input_shapes)
    if isinstance(mod, str | os.PathLike):
        path = Path(mod)
        if path.suffix.lower() != ".onnx":
            raise ModelError(
                f"{path} is not an .onnx file; models are .onnx files, exported programs or Relax modules"
            )
        from tvm_qfp8.importers.onnx_model import from_onnx_path

        return from_onnx_path(path, params, input_shapes)
    kind = type(mod).__module__.split(".")[0]
    if kind == "onnx":
        from tvm_qfp8.importers.onnx_model import from_onnx_model

        return from_onnx_model(mod, params, input_shapes)
    if kind == "torch":
        from tvm_qfp8.importers.torch_export import from_exported_program

        return from_exported_program(mod, params, input_shapes)
    raise ModelError(
        f"a model of type {type(mod).__name__} is not known; give an .onnx path, onnx.ModelProto, "
        "torch.export.ExportedProgram or Relax IRModule"
    )
