"""How layers are called: by the names of the variables that hold their results, which importers take from the file.

TVM's block builder turns the dots of a name that it is given into underscores, so that ``encoder.0.fc`` of a torch
module would not be found again; variables carry another dot.
"""

from __future__ import annotations

from tvm import relax

_DOT = "\N{ONE DOT LEADER}"


def variable_name(layer: str) -> str:
    """The name to give to a variable that holds what ``layer`` computes."""
    return layer.replace(".", _DOT)


def layer_name(var: relax.Var) -> str:
    """What the file calls what ``var`` is bound to."""
    return str(var.name).replace(_DOT, ".")
