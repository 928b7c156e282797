"""``torch.export`` programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tvm_qfp8.errors import ModelError, UnsupportedOperatorError
from tvm_qfp8.importers.finite_weights import check_finite
from tvm_qfp8.importers.imported import Imported
from tvm_qfp8.importers.name_layers import LayerNames, layer_of_module
from tvm_qfp8.importers.relax_module import from_relax
from tvm_qfp8.importers.torch_converters import CONVERTERS
from tvm_qfp8.importers.torch_decompositions import decompose
from tvm_qfp8.importers.torch_float32 import to_float32
from tvm_qfp8.importers.torch_recurrent import recurrent_converters


def from_exported_program(
    program: Any, params: Mapping[str, np.ndarray | float], input_shapes: Mapping[str, tuple[int, ...]]
) -> Imported:
    """An ``ExportedProgram``; ``params`` bind inputs, dimensions that it leaves open are given by ``input_shapes``."""
    from torch.export import ExportedProgram
    from tvm.relax.frontend.torch import from_exported_program as convert
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    if not isinstance(program, ExportedProgram):
        raise ModelError(
            f"a {type(program).__name__} is not an exported program; use torch.export.export(model.eval(), inputs)"
        )
    check_finite((name, _array(tensor)) for name, tensor in program.named_parameters())
    check_finite(((name, _array(tensor)) for name, tensor in program.named_buffers()), infinity_allowed=True)
    names = LayerNames()
    try:
        program, notes = to_float32(program)
        program = decompose(program)
        with _noting_names(ExportedProgramImporter, names):
            mod = convert(
                program,
                keep_params_as_input=False,
                unwrap_unit_return_tuple=True,
                custom_convert_map=CONVERTERS | recurrent_converters(program),
                run_ep_decomposition=False,
            )
    except UnsupportedOperatorError:
        raise
    except Exception as error:  # the front end raises whatever its converters do
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UnsupportedOperatorError(
            f"TVM cannot import the exported program: {reason}; replace that operator in the model and export again"
        ) from error
    imported = from_relax(mod, params, input_shapes)
    imported.mod = names.given_to(imported.mod)
    imported.notes.extend(notes)
    return imported


@contextlib.contextmanager
def _noting_names(importer: Any, names: LayerNames) -> Iterator[None]:
    """Notes behind each node of a graph what TVM's front end made of it."""
    translate = importer._translate_fx_graph

    def noted(self: Any, nodes: Iterable[Any]) -> Iterator[Any]:
        for node in nodes:
            yield node
            if node.op == "call_function":
                result = self.env[node]
                stack = [*(node.meta.get("nn_module_stack") or {"": ("", "")}).values()]
                path, kind = stack[-1]
                fields = result if isinstance(result, list | tuple) else [result]
                names.note(self.block_builder, fields, layer_of_module(path, str(kind), node.name))

    importer._translate_fx_graph = lambda self, module, nodes, *rest: translate(
        self, module, noted(self, nodes), *rest
    )
    try:
        yield
    finally:
        importer._translate_fx_graph = translate


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
