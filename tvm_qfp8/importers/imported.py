"""What an importer hands on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from tvm_qfp8.importers.open_length import OpenLength


def result_types(mod: tvm.IRModule) -> list[Any]:
    """The types of what ``main`` returns."""
    result = mod["main"].ret_ty
    return list(result.fields) if isinstance(result, relax.TupleType) else [result]


@dataclass
class Imported:
    """A model as Relax.

    Attributes
    ----------
    mod : tvm.IRModule
        One static ``main``, constants bound.
    input_names, output_names : list of str
        In the order of ``main``'s parameters and results.
    notes : list of str
        What a user should know, for the report.
    batch : str or None
        Name of a batch that stays open; ``mod`` is for one sample.
    length : OpenLength or None
        Lengths of a dimension that has several; ``mod`` is for the longest.
    """

    mod: tvm.IRModule
    input_names: list[str]
    output_names: list[str]
    notes: list[str] = field(default_factory=list)
    batch: str | None = None
    length: OpenLength | None = None
