"""One table as a figure: the function and its interpolation above, the error and its proved bound below."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tvm_qfp8.errors import TableError
from tvm_qfp8.plots.window import cell_boundaries, window_of
from tvm_qfp8.tables import Table
from tvm_qfp8.tables.families import find_function

FORMATS = ("png", "svg", "pdf")
POINTS = 6001
EXACT, TABLE, BOUND, CELL = "#9aa0a6", "#1a56db", "#c81e1e", "#d9dce0"


def table_figure(
    table: Table,
    reference: Callable[[np.ndarray], np.ndarray] | None = None,
    domain: tuple[float, float] | None = None,
) -> Figure:
    """A figure of ``table``; it belongs to no window system.

    Parameters
    ----------
    table
    reference
        float64 -> float64; needed where the table was not made of a named function.
    domain
        Arguments shown, ``(low, high)``; by default where the table's cells are, with some tail.

    Raises
    ------
    TableError
        The table's function has no name and no reference was given.
    """
    if reference is None:
        reference = find_function(table.name).reference
    low, high, logarithmic = window_of(table, domain)
    space = np.geomspace if logarithmic else np.linspace
    x = np.unique(space(low, high, POINTS).astype(np.float32))
    with np.errstate(all="ignore"):
        exact = np.asarray(reference(x.astype(np.float64)), np.float64)
        y = table(x).astype(np.float64)
        error = (y - exact) / (np.abs(exact) if table.relative else np.maximum(1.0, np.abs(exact)))
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (upper, lower):
        axes.grid(False)
        axes.spines[["top", "right"]].set_visible(False)
        for boundary in cell_boundaries(table):
            if low < boundary < high:
                axes.axvline(boundary, color=CELL, linewidth=0.6, zorder=0)
    upper.plot(x, exact, color=EXACT, linewidth=4.0, label=f"{table.name} in float64")
    upper.plot(x, y, color=TABLE, linewidth=1.2, label="table in float32")
    upper.legend(frameon=False)
    upper.set_title(f"{table.name}: {describe(table)}", loc="left")
    lower.plot(x, error, color=TABLE, linewidth=0.8)
    for sign in (1.0, -1.0):
        lower.axhline(
            sign * table.max_error,
            color=BOUND,
            linestyle="--",
            linewidth=1.0,
            label="proved bound" if sign > 0 else None,
        )
    lower.legend(frameon=False, loc="upper right")
    lower.set_ylabel("relative error" if table.relative else "error / max(1, |f|)")
    lower.set_xlabel("x")
    lower.ticklabel_format(axis="y", scilimits=(-2, 2))
    if logarithmic:
        lower.set_xscale("log", base=2)
        if (exact > 0).all() and exact.max() > 100 * exact.min():
            upper.set_yscale("log", base=2)
    return figure


def describe(table: Table) -> str:
    """Form, size and bounds in one line."""
    bounds = f"error <= {table.max_error:.2e} proved, {table.observed_error:.2e} observed"
    if not table.cells:
        return f"plain arithmetic, {bounds}"
    cells = "one cell" if table.cells == 1 else f"{table.cells} cells"
    return f"{cells} of degree {table.degree} ({table.nbytes} bytes), {bounds}"


def table_svg(table: Table, reference: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
    """:func:`table_figure` as the text of an SVG without XML header, to be put into a page."""
    text = figure_bytes(table_figure(table, reference), "svg").decode()
    return text[text.index("<svg") :]


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a file of ``kind``, one of ``FORMATS``; the same figure gives the same bytes.

    Raises
    ------
    TableError
        Another kind.
    """
    check_kind(kind)
    stream = io.BytesIO()
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "tvm-qfp8"}):
        figure.savefig(stream, format=kind, dpi=120, metadata=dated)
    return stream.getvalue()


def check_kind(kind: str) -> None:
    """Refuse a kind of file that is not one of ``FORMATS``.

    Raises
    ------
    TableError
        Naming those that are.
    """
    if kind not in FORMATS:
        raise TableError(f"plots are written as .{', .'.join(FORMATS)}, not as .{kind}; choose one of these")
