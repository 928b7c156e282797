"""``bundle``: a module, TVM's runtime, a manifest and two runners in one folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from tvm_qfp8.bundling.manifest import MODULE, write_manifest
from tvm_qfp8.bundling.runtime_libraries import runtime_libraries
from tvm_qfp8.cpu_features import reported_features
from tvm_qfp8.errors import ModelError, TargetError
from tvm_qfp8.lengths import Lengths
from tvm_qfp8.linker import ZIG_TRIPLES, architecture, run_compiler, zig_compiler
from tvm_qfp8.runtime import read_metadata
from tvm_qfp8.shared_object import machine_of
from tvm_qfp8.targets import cpu_features, parse_target
from tvm_qfp8.tensor_info import tensor_infos

BOARD = Path(__file__).parent / "board"
SOURCES = ("qfp8_model.h", "sha256.h", "run.cc", "CMakeLists.txt")
_MACHINES = {"armv7a": "armv7l"}


def bundle(module: str | os.PathLike, output: str | os.PathLike, target: str | None = None) -> Path:
    """Write a folder that runs ``module`` on a board, offline and without Python packages.

    Parameters
    ----------
    module : path
        What ``CompiledModule.export_library`` or ``tvm-qfp8 compile`` wrote, for any machine.
    output : path
        The folder to write; it must not exist or be empty.
    target : str
        The target that the module was compiled for, such as ``"rpi4"``; checked against the file.

    Returns
    -------
    Path
        The folder: ``model.so``, ``lib/`` (runtime), ``include/``, ``cpp/`` (runner and CMake file), ``run`` (the
        runner, where ``ziglang`` is installed to build it), ``run.py``, ``manifest.txt`` and ``README.md``.

    Raises
    ------
    ModelError
        The file is no module of this package, or the folder is not empty.
    TargetError
        The module is made for another machine than the target's, or uses CPU features that the target lacks.
    """
    source, folder = Path(module), Path(output)
    if not source.is_file():
        raise ModelError(f"no such module: {source}")
    machine, metadata = machine_of(source), read_metadata(source)
    if metadata["device"] != "cpu":
        raise ModelError(
            f"{source} is compiled for an NVIDIA GPU; bundles are for CPUs: copy the file and load it there with "
            "tvm_qfp8.load"
        )
    if target is not None:
        wanted = architecture(parse_target(target))
        wanted = _MACHINES.get(wanted, wanted)
        if wanted != machine:
            raise TargetError(
                f"{source} is made for {machine}, {target} is {wanted}; compile it with --target {target}"
            )
        has = cpu_features(parse_target(target))
        more = [name for name in metadata["cpu"]["features"] if name not in has]
        if more:
            raise TargetError(
                f"{source} uses {', '.join(more)}, which {target} does not have: it was compiled for another CPU; "
                f"compile it with --target {target}"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; name a new folder")
    if not folder.absolute().parent.is_dir():
        raise ModelError(f"cannot write {folder}: folder {folder.absolute().parent} does not exist")
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".tvm_qfp8_") as temporary:
        part = Path(temporary) / "bundle"
        _fill(part, source, machine, target or machine, metadata)
        if folder.exists():
            folder.rmdir()
        shutil.move(str(part), folder)
    return folder


def _fill(folder: Path, module: Path, machine: str, target: str, metadata: dict) -> None:
    import tvm_ffi

    (folder / "cpp").mkdir(parents=True)
    (folder / "lib").mkdir()
    shutil.copyfile(module, folder / MODULE)
    libraries = runtime_libraries(machine)
    for library in libraries:
        shutil.copyfile(library, folder / "lib" / library.name)
    shutil.copytree(Path(tvm_ffi.__file__).parent / "include", folder / "include")
    for name in SOURCES:
        shutil.copyfile(BOARD / name, folder / "cpp" / name)
    shutil.copyfile(BOARD / "run.py", folder / "run.py")
    built = _build_runner(folder, machine) if libraries else False
    files = [MODULE, *(f"lib/{library.name}" for library in libraries)]
    inputs = tensor_infos(metadata["inputs"])
    if metadata["lengths"] is None:
        programs = {"main": (inputs, tensor_infos(metadata["outputs"]))}
    else:
        variants = Lengths.from_json(metadata["lengths"]).variants
        programs = {variant.function: (variant.inputs, variant.outputs) for variant in variants}
    features = reported_features(metadata["cpu"]["architecture"], metadata["cpu"]["features"])
    write_manifest(folder, target, machine, metadata["versions"], features, files, programs)
    (folder / "README.md").write_text(_readme(target, machine, bool(libraries), built, inputs))


def _build_runner(folder: Path, machine: str) -> bool:
    """Compile the C++ runner, so that the board needs no compiler; False where no zig is installed."""
    if importlib.util.find_spec("ziglang") is None or machine not in ZIG_TRIPLES:
        return False
    sources = [f"-I{folder / 'include'}", str(folder / "cpp" / "run.cc")]
    libraries = [f"-L{folder / 'lib'}", "-Wl,--no-as-needed", "-ltvm_ffi", "-ltvm_runtime"]
    options = ["-std=c++17", "-O2", "-s", "-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN/lib"]
    run_compiler([*zig_compiler(machine), *options, *sources, *libraries, "-o", str(folder / "run")])
    return True


def _readme(target: str, machine: str, runtime: bool, built: bool, inputs: list) -> str:
    text = (BOARD / "README.md").read_text()
    example = " ".join(f"{index}.npy" for index, _ in enumerate(inputs))
    notes = []
    if not runtime:
        notes.append(
            f"TVM publishes no runtime for {machine}. Build libtvm_ffi.so and libtvm_runtime.so from TVM's source\n"
            "(version in manifest.txt) on the board or with a cross compiler, and put them into lib/.\n"
        )
    if not built:
        notes.append(
            "The runner is not built yet: cmake -S cpp -B build && cmake --build build && cp build/run .\n"
        )
    return text.format(target=target, machine=machine, inputs=example, notes="\n".join(notes))
