"""README.md: tables are those of the stored results, the snippet runs, commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import readme_tables
from models import cnn

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "README.md").read_text()


def test_tables_are_current():
    for page in readme_tables.PAGES:
        text = page.read_text()
        assert readme_tables.fill(text) == text, "run scripts/readme_tables.py"


def test_the_snippet_runs(tmp_path):
    onnx.save(cnn(), tmp_path / "model.onnx")
    code = re.search(r"<!-- snippet: compile -->\n```python\n(.*?)```", TEXT, re.DOTALL)[1]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True
    )


def test_the_commands_exist():
    for script in re.findall(r"^(scripts/\w+)", TEXT, re.MULTILINE):
        assert os.access(REPOSITORY / script, os.X_OK), script
    from typer.testing import CliRunner

    from tvm_qfp8.cli import app

    for command in set(re.findall(r"^tvm-qfp8 (\w+)", TEXT, re.MULTILINE)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_the_commands_for_servers_run(tmp_path):
    """docs/amx.md: each line compiles a model; the second for a CPU that this machine need not be."""
    model = cnn()
    onnx.save(model, tmp_path / "model.onnx")
    image = model.graph.input[0]
    shape = [dimension.dim_value for dimension in image.type.tensor_type.shape.dim]
    samples = np.random.default_rng(0).standard_normal((8, *shape[1:]), np.float32)
    np.savez(tmp_path / "samples.npz", **{image.name: samples})
    page = (REPOSITORY / "docs" / "amx.md").read_text()
    commands = re.findall(r"^tvm-qfp8 ([^#\n]+)", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        (tmp_path / "model.so").unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        arguments = [sys.executable, "-m", "tvm_qfp8", *command.split()]
        subprocess.run(arguments, cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert (tmp_path / "model.so").is_file()


def test_the_folders_exist():
    for folder in re.findall(r"^\| `(\w+/)`", TEXT, re.MULTILINE):
        assert (REPOSITORY / folder).is_dir(), folder
