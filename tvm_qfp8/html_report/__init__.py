"""The report as one page of HTML that needs no network. Needs the extra ``report``."""

from tvm_qfp8.errors import MissingPackageError

try:
    import jinja2  # noqa: F401
except ImportError as error:
    raise MissingPackageError(
        f"the HTML report needs jinja2, which cannot be imported ({error}); pip install 'tvm-qfp8[report]'"
    ) from error

from tvm_qfp8.html_report.page import html_page

__all__ = ["html_page"]
