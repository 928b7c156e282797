"""Wheel, sdist, editable and uninstalled use hold the same packages, each file once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAPPED = ("relay_passes", "topi", "tuning_logs")
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".cache", "__pycache__", "build", "dist", "*.egg-info"
)

pytestmark = pytest.mark.skipif(
    not (REPOSITORY / "pyproject.toml").is_file(), reason="the tests run outside the repository"
)


def _package_files() -> set[str]:
    """Every module as ``tvm_qfp8/...``, from the source folders."""
    files = set()
    for top, prefix in [("tvm_qfp8", "tvm_qfp8"), *((name, f"tvm_qfp8/{name}") for name in MAPPED)]:
        for folder, folders, names in os.walk(REPOSITORY / top, followlinks=False):
            folders[:] = [name for name in folders if name != "__pycache__"]
            inside = Path(folder).relative_to(REPOSITORY / top)
            files |= {(Path(prefix) / inside / name).as_posix() for name in names if name.endswith(".py")}
    return files


def _build(kind: str, source: Path, output: Path) -> Path:
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    output.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    shutil.copytree(REPOSITORY, copy, symlinks=True, ignore=IGNORED)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    return _build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return _build("wheel", source, tmp_path_factory.mktemp("wheel"))


def _modules(archive: list[str]) -> list[str]:
    return sorted(name for name in archive if name.endswith(".py"))


def test_links_are_relative():
    for name in MAPPED:
        link = REPOSITORY / "tvm_qfp8" / name
        assert link.is_symlink(), f"tvm_qfp8/{name} must be a link: git on Windows needs core.symlinks=true"
        assert os.readlink(link) == f"../{name}"


def test_wheel_holds_every_module_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert _modules(names) == sorted(_package_files())
    assert "tvm_qfp8/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    logs = {
        f"tvm_qfp8/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "tuning_logs").rglob("*.json")
    }
    assert logs <= set(names)


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        assert not [member.name for member in members if member.issym()]
        for name in MAPPED:
            assert not [member.name for member in members if f"/tvm_qfp8/{name}/" in member.name]
        archive.extractall(tmp_path, filter="data") if hasattr(
            tarfile, "data_filter"
        ) else archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / "tests" / "conftest.py").is_file()
    again = _build("wheel", unpacked, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def _empty_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but none of their editable installs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path(site.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _install(python: Path, *what: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, "--no-build-isolation", *what], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


CHECK = """
import importlib.util, pathlib, sys
import tvm_qfp8
from tvm_qfp8 import topi, relay_passes, tuning_logs
root = pathlib.Path(sys.argv[1]).resolve()
for module in (tvm_qfp8, topi, relay_passes, tuning_logs):
    assert root in pathlib.Path(module.__file__).resolve().parents, (module.__file__, root)
assert tvm_qfp8.encode([1.0]).dtype == "uint8"
"""


def _check(python: Path, root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, "-c", CHECK, str(root)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=_clean(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    command = python.parent / "tvm-qfp8"
    done = subprocess.run(
        [command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False, env=_clean()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("tvm-qfp8 ")


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_install_wheel(wheel, tmp_path):
    python = _empty_environment(tmp_path / "venv")
    _install(python, str(wheel))
    _check(python, tmp_path / "venv", tmp_path)


@pytest.mark.slow
def test_install_sdist(sdist, tmp_path):
    python = _empty_environment(tmp_path / "venv")
    _install(python, str(sdist))
    _check(python, tmp_path / "venv", tmp_path)


@pytest.mark.slow
def test_install_folder(source, tmp_path):
    python = _empty_environment(tmp_path / "venv")
    _install(python, str(source))
    _check(python, tmp_path / "venv", tmp_path)


@pytest.mark.slow
def test_install_editable(source, tmp_path):
    python = _empty_environment(tmp_path / "venv")
    _install(python, "--editable", str(source))
    _check(python, source, tmp_path)


@pytest.mark.slow
def test_uninstalled(source, tmp_path):
    environment = _clean() | {"PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(source)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
