"""The commands on a small network, each in a process of its own, and what users get wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tvm_qfp8.cli import app
from tvm_qfp8.runtime import METADATA_FORMAT


def _tvm_qfp8(*arguments, folder, expected=0):
    environment = os.environ | {"TVM_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tvm_qfp8", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def _network(path, weight, bias, rows="batch"):
    shape = [rows, weight.shape[0]]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Add", ["m", "b"], ["a"]),
            helper.make_node("Sigmoid", ["a"], ["y"]),
        ],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with ``net.onnx``, ``samples.npz``, ``x.npy`` and the float32 answer ``y.npy``."""
    folder = tmp_path_factory.mktemp("project")
    generator = np.random.default_rng(7)
    weight = generator.standard_normal((48, 24)).astype(np.float32) / 7
    bias = generator.standard_normal(24).astype(np.float32)
    _network(folder / "net.onnx", weight, bias)
    np.savez(folder / "samples.npz", x=generator.standard_normal((32, 48)).astype(np.float32))
    x = generator.standard_normal((4, 48)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", 1 / (1 + np.exp(-(x @ weight + bias))))
    return folder


@pytest.fixture(scope="module")
def module(project):
    _tvm_qfp8(*("compile", "net.onnx", "-s", "x=4,48", "-c", "samples.npz", "-o", "net.so"), folder=project)
    return project / "net.so"


def test_run_is_close_to_float32(project, module):
    _tvm_qfp8("run", module, "-i", "x=x.npy", "-o", "out.npz", folder=project)
    with np.load(project / "out.npz") as archive:
        (name,) = archive.files
        found = archive[name]
    expected = np.load(project / "y.npy")
    assert found.shape == expected.shape
    noise = ((found - expected) ** 2).sum()
    # E2M5 has at least 6 significant bits: rounding noise of weight and activation lies some 30 dB below the signal.
    assert 10 * np.log10((expected**2).sum() / noise) > 25


def test_report_names_the_layer(project, module):
    report = json.loads(_tvm_qfp8("report", module, "--json", folder=project).stdout)
    assert [layer["became"] for layer in report["layers"] if layer["operator"] == "matmul"] == ["QFP8"]
    text = _tvm_qfp8("report", module, folder=project).stdout
    assert "matmul" in text and re.search(
        r"signal to error of outputs, dB: y \d\d\.\d \(4 of the samples\)", text
    )


def test_bench(project, module):
    found = json.loads(_tvm_qfp8("bench", module, "-n", "3", "--json", folder=project).stdout)
    assert found["results"][0]["median_ms"] > 0


def test_bench_of_a_file_of_half_precision_with_an_input_that_is_given(tmp_path):
    pytest.importorskip("onnxruntime")
    half = TensorProto.FLOAT16
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Mul", ["m", "gain"], ["y"])]
    inputs = [
        helper.make_tensor_value_info("x", half, (4, 8)),
        helper.make_tensor_value_info("gain", half, ()),
    ]
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float16), "w")
    graph = helper.make_graph(
        nodes, "half", inputs, [helper.make_tensor_value_info("y", half, (4, 8))], [weight]
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, tmp_path / "half.onnx")
    done = _tvm_qfp8("bench", "half.onnx", "--param", "gain=2", "-n", "1", "--json", folder=tmp_path)
    assert [row["name"] for row in json.loads(done.stdout)["results"]] == ["onnxruntime float32", "QFP8"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("compile", "open.onnx", "-s", "x=4,48", "-p", "gain=2", "-o", "bad.so"), "no input 'gain'"),
        (("compile", "x.npy", "-o", "bad.so"), "x.npy"),
        (("compile", "cut.onnx", "-o", "bad.so"), "cut.onnx"),
        (("compile", "nan.onnx", "-s", "x=4,48", "-o", "bad.so"), "'w'"),
        (("compile", "open.onnx", "-o", "bad.so"), "'x' has open dimensions"),
        (("compile", "net.onnx", "-s", "z=4,48", "-o", "bad.so"), "z"),
        (("compile", "net.onnx", "-s", "x=4,48", "-c", "wrong.npz", "-o", "bad.so"), "'x'"),
        (("run", "net.so", "-i", "y=x.npy"), "'y'"),
        (("run", "net.so", "-i", "x=double.npy"), "float64"),
    ],
)
def test_each_mistake_is_one_clear_line(project, module, arguments, word, monkeypatch):
    (project / "cut.onnx").write_bytes((project / "net.onnx").read_bytes()[:700])
    _network(project / "nan.onnx", np.full((48, 24), np.nan, np.float32), np.zeros(24, np.float32))
    _network(project / "open.onnx", np.ones((48, 24), np.float32), np.zeros(24, np.float32), rows="time")
    np.savez(project / "wrong.npz", other=np.zeros((4, 48), np.float32))
    np.save(project / "double.npy", np.zeros((4, 48)))
    monkeypatch.chdir(project)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert word in errors[0]
    assert "Traceback" not in done.stderr
    assert not (project / "bad.so").exists()
    assert not list(project.glob(".tvm_qfp8_*"))


def test_a_cut_off_module_does_not_crash(project, module):
    (project / "cut.so").write_bytes(module.read_bytes()[:5000])
    done = _tvm_qfp8("run", "cut.so", "-i", "x=x.npy", folder=project, expected=1)
    assert "cut.so is cut off" in done.stderr


@pytest.mark.aarch64
def test_arm_gives_the_same_bits(project, module, run_aarch64):
    _tvm_qfp8(
        *("compile", "net.onnx", "-s", "x=4,48", "-c", "samples.npz", "-t", "rpi4", "-o", "arm.so"),
        folder=project,
    )
    _tvm_qfp8("run", module, "-i", "x=x.npy", "-o", "here.npz", folder=project)
    with np.load(project / "here.npz") as archive:
        (expected,) = archive.values()
    (found,) = run_aarch64(project / "arm.so", [np.load(project / "x.npy")])
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    refused = _tvm_qfp8("run", "arm.so", "-i", "x=x.npy", folder=project, expected=1)
    assert "made for aarch64" in refused.stderr


def test_profile_lists_every_kernel(project, module):
    done = _tvm_qfp8("bench", module, "--profile", "-n", "2", "--json", folder=project)
    kernels = json.loads(done.stdout)
    assert any(kernel["kernel"].startswith("matmul") for kernel in kernels)
    assert all(kernel["microseconds"] > 0 and kernel["bytes"] > 0 and kernel["shapes"] for kernel in kernels)


def test_a_module_of_another_format_is_refused(project, module):
    current = b'{"format": %d, "inputs"' % METADATA_FORMAT
    old = module.read_bytes().replace(current, b'{"format": 1, "inputs"')
    (project / "old.so").write_bytes(old)
    done = _tvm_qfp8("report", "old.so", folder=project, expected=1)
    assert "format 1" in done.stderr and "compile it again" in done.stderr


def test_sensitivity_ranks_the_layers(project, module):
    done = _tvm_qfp8(
        *("report", "net.onnx", "--sensitivity", "-s", "x=4,48", "-c", "samples.npz", "--json"),
        folder=project,
    )
    effects = json.loads(done.stdout)
    assert effects and all(effect["operator"] == "matmul" for effect in effects)
    done = _tvm_qfp8("report", "net.onnx", folder=project, expected=1)
    assert "--sensitivity" in done.stderr
    done = _tvm_qfp8("report", "net.onnx", "--sensitivity", "-s", "x=4,48", folder=project, expected=1)
    assert "needs calibration samples" in done.stderr
