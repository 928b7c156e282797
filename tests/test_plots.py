"""Pictures of tables, and the command that prints and draws one."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from tvm_qfp8.cli import app
from tvm_qfp8.errors import TableError
from tvm_qfp8.tables import build_table

pytest.importorskip("matplotlib", reason="matplotlib is of the extra report")

import plot_functions  # noqa: E402

from tvm_qfp8 import plots  # noqa: E402
from tvm_qfp8.plots.window import cell_boundaries, window_of  # noqa: E402


@pytest.fixture
def invoke():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["gelu", "exp", "log", "pow(1.7)", "sin", "hardswish", "elu(0.5)'", "mish"])
def test_figure_shows_the_table_and_its_error_within_the_bound(name):
    table = build_table(name)
    upper, lower = plots.table_figure(table).axes
    x, y = upper.lines[-1].get_data()
    np.testing.assert_array_equal(y, table(x).astype(np.float64))
    (error,) = [line for line in lower.lines if len(line.get_xdata()) == len(x)]
    assert np.isfinite(error.get_ydata()).all()
    assert 0 < np.abs(error.get_ydata()).max() <= table.max_error * (1 + 1e-6)
    assert name in upper.get_title(loc="left")
    assert f"{table.max_error:.2e}" in upper.get_title(loc="left")


def test_boundaries_are_where_the_cell_changes():
    table = build_table("tanh")
    found = np.array(cell_boundaries(table))
    low, high, _ = window_of(table)
    x = np.linspace(0, high, 100_001, dtype=np.float32)
    t = np.minimum(np.float32(table.high), np.float32(table.scale) * x)
    cell = (t + np.float32(table.magic)).view(np.int32)
    np.testing.assert_allclose(found[found > 0], x[1:][np.diff(cell) != 0], atol=2 * high / 100_000)
    np.testing.assert_array_equal(found, -found[::-1])
    assert low == -high


def test_a_callable_needs_its_reference_and_the_same_figure_gives_the_same_bytes():
    table = build_table(np.arctan, domain=(-3, 3))
    with pytest.raises(TableError, match="unknown"):
        plots.table_figure(table)
    first, second = (plots.table_svg(table, np.arctan) for _ in range(2))
    assert first == second and first.startswith("<svg")
    assert not re.search(
        r"<script|https?://(?!www\.w3\.org|matplotlib\.org|purl\.org|creativecommons)", first
    )


def test_script_names_files_for_any_system():
    assert plot_functions.file_name("elu(0.5)'") == "elu_0.5_derivative"
    names = [plot_functions.file_name(name) for name in plot_functions.NAMES]
    assert len(set(names)) == len(names)


def test_script_writes_one_file_a_function(tmp_path, monkeypatch, capsys):
    arguments = ["plot_functions", str(tmp_path / "plots"), "--functions", "gelu,elu(0.5)", "--format", "png"]
    monkeypatch.setattr(sys, "argv", arguments)
    plot_functions.main()
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["elu_0.5.png", "gelu.png"]
    assert capsys.readouterr().out.count(".png") == 2


def test_command_prints_and_draws(invoke, tmp_path):
    path = tmp_path / "gelu.png"
    done = invoke("table", "gelu", "--max-error", "1e-4", "--monotone", "--exact-at", "1", "--plot", path)
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")
    table = build_table("gelu", 1e-4, monotone=True, exact_at=(1.0,))
    assert f"{table.max_error:.3e}" in done.output and f"{table.nbytes}" in done.output
    found = json.loads(invoke("table", "exp", "--domain", "-8", "0", "--json").output)
    assert found["error"] == "relative" and found["proved bound"] <= 1e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nosuch",), "unknown"),
        (("gelu", "--max-error", "1e-12"), "1e-07"),
        (("gelu", "--plot", "gelu.gif"), ".png, .svg, .pdf"),
        (("gelu", "--plot", "/nowhere/gelu.png"), "does not exist"),
        (("exp", "--monotone"), "give domain"),
        (("reciprocal", "--domain", "-1", "1"), "choose a domain without the pole"),
    ],
)
def test_command_refuses_in_one_line(invoke, arguments, message):
    done = invoke("table", *arguments)
    assert done.exit_code == 1
    assert message in done.output and done.output.count("\n") == 1


def test_without_matplotlib_the_command_names_the_extra(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in [name for name in sys.modules if name.startswith("tvm_qfp8.plots")]:
        monkeypatch.delitem(sys.modules, module)
    done = invoke("table", "gelu", "--plot", "gelu.png")
    assert done.exit_code == 1 and "tvm-qfp8[report]" in done.output
    assert invoke("table", "gelu").exit_code == 0
