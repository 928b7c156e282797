"""Relax operators that do nothing with numbers but put them elsewhere."""

KEEPS_ELEMENTS = (
    "relax.reshape",
    "relax.permute_dims",
    "relax.squeeze",
    "relax.expand_dims",
    "relax.flatten",
)
"""The result has the elements of the argument, each once."""

MOVES_DATA = frozenset(
    {
        *KEEPS_ELEMENTS,
        "relax.broadcast_to",
        "relax.concat",
        "relax.dynamic_strided_slice",
        "relax.flip",
        "relax.gather_elements",
        "relax.gather_nd",
        "relax.repeat",
        "relax.split",
        "relax.stack",
        "relax.strided_slice",
        "relax.take",
        "relax.tile",
    }
)
"""The result has elements of the first argument."""
