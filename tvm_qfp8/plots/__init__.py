"""Pictures of tables: each function with its cells and its error curve. Needs the extra ``report``."""

from tvm_qfp8.errors import MissingPackageError

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f"plots need matplotlib, which cannot be imported ({error}); pip install 'tvm-qfp8[report]'"
    ) from error

from tvm_qfp8.plots.table_figure import FORMATS, check_kind, figure_bytes, table_figure, table_svg

__all__ = ["FORMATS", "check_kind", "figure_bytes", "table_figure", "table_svg"]
