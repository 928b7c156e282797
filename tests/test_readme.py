"""README.md: tables are those of the stored results, the snippet runs, commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_the_folders_exist():
    for folder in re.findall(r"^\| `(\w+/)`", TEXT, re.MULTILINE):
        assert (REPOSITORY / folder).is_dir(), folder
