"""Relax operators that are replaced by a table, and the table's function."""

FUNCTIONS = {
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.nn.softplus": "softplus",
    "relax.sigmoid": "sigmoid",
    "relax.tanh": "tanh",
    "relax.erf": "erf",
    "relax.exp": "exp",
    "relax.log": "log",
}
