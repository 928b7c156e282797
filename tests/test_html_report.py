"""The report as a page: complete, escaped, without outside references; and the command that writes it."""

from __future__ import annotations

import html.parser
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from models import cnn, images
from typer.testing import CliRunner

pytest.importorskip("jinja2", reason="jinja2 is of the extra report")
pytest.importorskip("matplotlib", reason="matplotlib is of the extra report")

import tvm_qfp8
from tvm_qfp8.cli import app
from tvm_qfp8.distribution import HIGHEST, LOWEST, QUARTERS, distribution_of
from tvm_qfp8.errors import MissingPackageError
from tvm_qfp8.html_report.histogram import WIDTH, histogram
from tvm_qfp8.layer_effect import LayerEffect
from tvm_qfp8.profiling import KernelTime
from tvm_qfp8.report import LayerReport, Report

LAYERS = [
    LayerReport("lv<0>", "conv2d", "QFP8", "E2M5", "UE2M6", 3.25, 12.5, 4000, 1010),
    LayerReport("lv1", "gelu", "table gelu, error <= 1.0e-03", function="gelu"),
    LayerReport("lv2", "matmul", "float32", bytes_before=400, bytes_after=400, reason="skipped & kept"),
    LayerReport("lv3", "matmul", "QFP8", "E2M5", "E3M4", -1.0, 41.0, 400, 110),
]


def _report() -> Report:
    return Report("native", list(LAYERS), ["a <note>"], {"weight bytes": "4800 -> 1520"})


class _Tags(html.parser.HTMLParser):
    """Rows of the first table's body, and whether what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag in ("table", "tr", "td", "figure", "svg", "div", "ol", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("table", "tr", "td", "figure", "svg", "div", "ol", "p"):
            assert self.open.pop() == tag


def test_page_shows_layers_blame_and_functions():
    page = _report().to_html()
    tags = _Tags()
    tags.feed(page)
    assert not tags.open and tags.count["table"] == 1 and tags.count["tr"] == 1 + len(LAYERS)
    assert tags.count["figure"] == 1 and "gelu" in page
    assert "lv&lt;0&gt;" in page and "skipped &amp; kept" in page and "a &lt;note&gt;" in page
    assert page.index("lv&lt;0&gt; (conv2d): 12.5 dB") < page.index("lv3 (matmul): 41.0 dB")


def test_page_needs_no_network():
    page = re.sub(r"<svg.*?</svg>", "", _report().to_html(), flags=re.DOTALL)
    assert not re.search(r"https?:|src=|<link|@import", page)


def test_times_are_shown_where_given():
    kernels = [
        KernelTime("conv2d_encode", "stem", 20.0, 2048, ["uint8[1,2]"]),
        KernelTime("softmax", "head", 5.0, 1024, []),
    ]
    page = _report().to_html(kernels)
    assert "Time by kernel" in page and "conv2d_encode" in page and "0.025 ms in 2 kernel calls" in page
    assert "Time by kernel" not in _report().to_html()


def test_an_empty_report_is_a_page():
    assert "Layers" in Report().to_html()


def test_distributions_are_drawn_against_the_grid():
    steps = np.array([0.0, 0.25, 3.0, 3.2, 100.0, 300.0], np.float32)
    layer = LayerReport("lv", "conv2d", "QFP8", "E2M5", "UE2M6", weights=distribution_of(steps))
    page = Report(layers=[layer]).to_html()
    assert "Distributions against the grid" in page and page.count("<path") == 1
    assert "weights, E2M5: 33 % become 0, 17 % are clipped" in page
    assert "Distributions" not in Report().to_html()
    found = histogram("weights", "E2M5", layer.weights)
    assert [value for _, value in found.binades] == ["64", "128", "256"]
    assert 0 < found.zero_end < found.binades[0][0] < found.top < found.binades[-1][0] < WIDTH
    assert Report.from_json(Report(layers=[layer]).to_json()).layers == [layer]


def test_ranking_is_shown_where_it_was_made():
    effects = [LayerEffect("lv<9>", "conv2d", 30.25, 9.5), LayerEffect("lv1", "take", None, 60.0)]
    report = Report(layers=list(LAYERS), sensitivity=effects)
    page = report.to_html()
    assert "Harm of each layer alone" in page and "lv&lt;9&gt;" in page and ">9.5<" in page
    assert "Which layers to blame first" not in page
    assert Report.from_json(report.to_json()) == report


def test_a_compiled_module_holds_the_distributions_of_its_data():
    report = tvm_qfp8.compile(cnn(), calibration=images(2)).report
    layers = [layer for layer in report.layers if layer.activation_layout]
    assert layers and all(layer.weights and layer.activations for layer in layers)
    for layer in layers:
        for found in (layer.weights, layer.activations):
            assert sum(found.ppm) / 1e6 + found.zeros == pytest.approx(1, abs=1e-4)
            assert len(found.ppm) <= (HIGHEST - LOWEST) * QUARTERS + 1
    assert len(report.to_json()) < 20_000


def test_json_of_older_modules_is_read():
    data = json.loads(_report().to_json())
    del data["max_error"], data["sensitivity"]
    for layer in data["layers"]:
        del layer["function"], layer["weights"], layer["activations"]
    assert Report.from_json(json.dumps(data)).max_error == 1e-3
    assert Report.from_json(_report().to_json()) == _report()


def test_without_jinja_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for name in [name for name in sys.modules if name.startswith("tvm_qfp8.html_report")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingPackageError, match=r"pip install 'tvm-qfp8\[report\]'"):
        _report().to_html()


def test_command_writes_the_page_of_a_module(tmp_path):
    module, page = tmp_path / "cnn.so", tmp_path / "report.html"
    tvm_qfp8.compile(cnn(), calibration=images(2)).export_library(module)
    result = CliRunner().invoke(app, ["report", str(module), "--html", str(page), "--profile"])
    assert result.exit_code == 0, result.output
    assert "Time by kernel" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == ["report.html"]
    (tmp_path / "plain").touch()
    assert page.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_command_writes_the_ranking_of_a_file(tmp_path):
    file, page = tmp_path / "cnn.onnx", tmp_path / "blame.html"
    onnx.save(cnn(), file)
    np.savez(tmp_path / "samples.npz", image=np.stack([x["image"] for x in images(3)]))
    arguments = ["--sensitivity", "-c", str(tmp_path / "samples.npz"), "--html", str(page)]
    result = CliRunner().invoke(app, ["report", str(file), *arguments])
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "Harm of each layer alone" in text and "Distributions against the grid" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile"], "--profile goes with --html"),
        (["--html", "x.html", "--json"], "a form of its own"),
        (["--html", "x.html", "--sensitivity", "--profile"], "--profile runs a compiled module"),
        (["--html", "none/x.html"], "does not exist"),
    ],
)
def test_wrong_options_say_what_to_do(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(tvm_qfp8), "load", lambda path: SimpleNamespace(report=_report(), inputs=[]))
    result = CliRunner().invoke(app, ["report", "m.so", *arguments])
    assert result.exit_code != 0 and message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())
