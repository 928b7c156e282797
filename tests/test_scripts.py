"""The scripts' own messages; what they do is shown by running them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")


def _run(script, *arguments, **environment):
    return subprocess.run(
        [SCRIPTS / script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def test_setup_refuses_an_old_python():
    done = _run("setup", PYTHON="false")
    assert done.returncode == 1
    assert done.stderr == "setup: error: PYTHON=false is not Python 3.10 or newer\n"


def test_test_explains_itself():
    done = _run("test", "--help")
    assert done.returncode == 0
    assert "--all" in done.stdout


@pytest.mark.parametrize("script", ["setup", "test", "demo", "formats", "aarch64_root", "../.ci/run"])
def test_scripts_are_executable_and_parse(script):
    assert os.access(SCRIPTS / script, os.X_OK)
    assert subprocess.run(["bash", "-n", SCRIPTS / script], check=False).returncode == 0


def test_aarch64_root_names_what_is_missing(tmp_path):
    for tool in ("bash", "dirname", "id", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = _run("aarch64_root", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt install qemu-user-static g++-aarch64-linux-gnu" in done.stderr


def test_tests_are_collected_with_the_extra_test_alone():
    """As `scripts/test` sets itself up without `--all`; what needs more is skipped."""
    others = (
        *("torch", "openvino", "nncf", "gguf", "sklearn", "tokenizers", "safetensors"),
        *("jinja2", "matplotlib", "ziglang", "PIL"),
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        "import pytest; sys.exit(pytest.main(['--collect-only', '-q', 'tests']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
