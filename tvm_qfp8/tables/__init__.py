"""Tables for nonlinear functions: multi-segment interpolation with a proved error bound."""

from tvm_qfp8.errors import TableError
from tvm_qfp8.tables.builder import build_table
from tvm_qfp8.tables.functions import FUNCTIONS, Function
from tvm_qfp8.tables.table import Table

__all__ = ["FUNCTIONS", "Function", "Table", "TableError", "build_table"]
