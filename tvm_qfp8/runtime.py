"""A compiled module: call it, save it, load it again in a fresh process."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_qfp8.errors import InputError, ModelError
from tvm_qfp8.kernel_calls import Calls
from tvm_qfp8.lengths import Lengths
from tvm_qfp8.report import Report
from tvm_qfp8.shared_object import check_shared_object
from tvm_qfp8.tensor_info import TensorInfo, tensor_entries, tensor_infos

METADATA_FUNCTION = "qfp8_metadata"
METADATA_FORMAT = 5
LOAD_FUNCTION = "qfp8_load"
"""Fills what kernels keep in memory; without it the first call does."""
LOADED = "bytes of transformed 3x3 filters, in memory only"
AT_LOAD = "made at load"
"""In the report's line ``LOADED`` until they are."""


@contextlib.contextmanager
def _without_scope_messages() -> Iterator[None]:
    """TVM's C++ prints "Scope Saving" and "Scope Loaded" for every constant; all else on stderr passes through."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            captured.seek(0)
            for line in captured:
                if not re.search(rb"Warning: Scope (Saving|Loaded):", line):
                    os.write(2, line)


def encode_metadata(
    inputs: list[TensorInfo],
    outputs: list[TensorInfo],
    report: Report,
    versions: dict[str, str],
    check_finite: bool,
    cpu: Mapping[str, Any],
    device: str = "cpu",
    batch: str | None = None,
    lengths: Lengths | None = None,
    calls: Calls | None = None,
) -> np.ndarray:
    """Metadata as UTF-8 JSON bytes ``(n,)`` uint8, embedded in the module as a constant.

    ``cpu`` is ``{"architecture": str, "features": [LLVM's names]}`` of the CPU that the module may run on,
    ``device`` what runs its kernels, ``"cpu"`` or ``"cuda"``, ``batch`` the name of an open batch, ``lengths`` those of
    a dimension that has several, ``calls`` for each function its kernel calls and their layers.
    """
    data = {
        "format": METADATA_FORMAT,
        "inputs": tensor_entries(inputs),
        "outputs": tensor_entries(outputs),
        "report": report.to_json(),
        "versions": versions,
        "check_finite": check_finite,
        "cpu": dict(cpu),
        "device": device,
        "batch": batch,
        "lengths": None if lengths is None else lengths.to_json(),
        "calls": dict(calls or {}),
    }
    return np.frombuffer(json.dumps(data).encode(), np.uint8).copy()


METADATA_START = re.compile(rb'\{"format": (\d+), "inputs": ')


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a module's file, which may be made for another machine: nothing of it is run.

    Raises
    ------
    ModelError
        The file holds none.
    """
    data = Path(path).read_bytes()
    start = METADATA_START.search(data)
    if start is None:
        raise ModelError(f"{path} was not written by tvm_qfp8: it holds no metadata")
    _check_format(int(start[1]))
    text = data[start.start() :].decode("utf-8", errors="replace")
    return json.JSONDecoder().raw_decode(text)[0]


def _check_format(found: int) -> None:
    if found != METADATA_FORMAT:
        raise ModelError(
            f"the module has format {found}, this version reads {METADATA_FORMAT}; compile it again"
        )


class CompiledModule:
    """A model compiled by ``tvm_qfp8.compile`` or read by ``tvm_qfp8.load``.

    Attributes
    ----------
    inputs, outputs : list of TensorInfo
        With an open batch those of one sample, with several lengths those of the longest.
    batch : str or None
        Name of an open batch: ``run`` takes any number of samples, one after the other.
    lengths : Lengths or None
        The lengths of a dimension that has several.
    report : Report
    calls : dict
        For each function the kernels that it calls, with the layer that each is for.
    """

    def __init__(
        self,
        metadata: np.ndarray,
        module: Any,
        executable: Any = None,
        target: tvm.target.Target | None = None,
    ) -> None:
        data = json.loads(metadata.tobytes().decode())
        _check_format(data["format"])
        self.inputs, self.outputs = tensor_infos(data["inputs"]), tensor_infos(data["outputs"])
        self.report = Report.from_json(data["report"])
        self.versions: dict[str, str] = data["versions"]
        self.check_finite: bool = data["check_finite"]
        self.cpu: dict[str, Any] = data["cpu"]
        self.batch: str | None = data["batch"]
        self.lengths = None if data["lengths"] is None else Lengths.from_json(data["lengths"])
        self.calls: Calls = data.get("calls", {})
        self.device = tvm.device(data["device"], 0)
        self._module, self._executable, self._target = module, executable, target
        self._arguments: dict[str, list[Any]] = {}

    @functools.cached_property
    def virtual_machine(self) -> Any:
        """TVM's virtual machine with this module, made at the first call."""
        from tvm.runtime.vm import VirtualMachine

        self.check_cpu()
        if not (tvm.runtime.enabled(self.device.type) and self.device.exist):
            raise ModelError(
                f"this machine has no {self.device} that TVM can use, and the module is compiled for "
                f"{self.report.target}; export it and run it there"
            )
        try:
            machine = VirtualMachine(self._module, self.device)
            if LOADED in self.report.totals:
                started = time.perf_counter()
                machine[LOAD_FUNCTION]()
                taken = f"made in {1e3 * (time.perf_counter() - started):.1f} ms"
                self.report.totals[LOADED] = self.report.totals[LOADED].replace(AT_LOAD, taken)
            return machine
        except RuntimeError as error:
            raise ModelError(
                f"this machine cannot run a module for {self.report.target}; export it and run it there"
            ) from error

    def check_cpu(self) -> None:
        """Refuse a CPU without the features that the module's code uses.

        Raises
        ------
        ModelError
        """
        from tvm_qfp8.cpu_features import missing_features, reported_features

        if self.cpu["architecture"] != platform.machine():
            return  # the loader refuses it
        missing = missing_features(reported_features(self.cpu["architecture"], self.cpu["features"]))
        if missing:
            on_cpu = self.device.type == "cpu"
            advice = "with --target native" if on_cpu else "for the GPU alone, such as --target cuda-sm80"
            raise ModelError(
                f"the module is compiled for {self.report.target} and uses {', '.join(missing)}, which this CPU "
                f"does not have; compile it {advice}"
            )

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Run on arrays in the order of ``inputs``; a list of arrays in the order of ``outputs``.

        Raises
        ------
        InputError
            A wrong number of arrays, a wrong shape or dtype, or a value that is not finite.
        """
        if len(arrays) != len(self.inputs):
            names = ", ".join(i.name for i in self.inputs)
            raise InputError(f"{len(arrays)} arrays given, the module has {len(self.inputs)} inputs: {names}")
        return self._call(arrays) if self.batch is None else self._call_by_sample(arrays)

    def _call_by_sample(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        arrays = [np.asarray(array) for array in arrays]
        counts = {
            info.name: len(array) if array.ndim else 0
            for info, array in zip(self.inputs, arrays, strict=True)
        }
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
            raise InputError(f"inputs have different numbers of samples: {found}")
        count = next(iter(counts.values()), 1)
        if count == 0:  # what one sample of zeros gives has the shapes
            return [
                result[:0] for result in self._call([np.zeros((1, *a.shape[1:]), a.dtype) for a in arrays])
            ]
        results = [self._call([array[i : i + 1] for array in arrays]) for i in range(count)]
        return [np.concatenate(parts) for parts in zip(*results, strict=True)]

    def _call(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        machine = self.virtual_machine
        function, tensors, length = self._prepared(arrays)
        result = machine[function](*tensors)
        results = [self._array(tensor) for tensor in ([result] if hasattr(result, "numpy") else result)]
        return results if self.lengths is None or length is None else self.lengths.cut(results, length)

    def _prepared(self, arrays: Sequence[np.ndarray]) -> tuple[str, list[Any], int | None]:
        """The function that runs ``arrays``, its arguments, and the length of inputs that had to be padded."""
        function, infos, padded_from = "main", self.inputs, None
        if self.lengths is not None:
            named = {info.name: np.asarray(array) for info, array in zip(infos, arrays, strict=True)}
            length = self.lengths.length_of(named)
            variant = self.lengths.variant_for(length)
            if variant.length != length:
                padded_from, named = length, self.lengths.pad(named, variant.length)
            function, infos, arrays = variant.function, variant.inputs, list(named.values())
        checked = [self._check(info, array) for info, array in zip(infos, arrays, strict=True)]
        return function, self._tensors(function, checked), padded_from

    def _tensors(self, function: str, arrays: list[np.ndarray]) -> list[Any]:
        """Arguments with these values, in the same memory at every call."""
        if function not in self._arguments:  # to make a tensor takes longer than a small network
            self._arguments[function] = [
                tvm.runtime.empty(array.shape, str(array.dtype), self.device) for array in arrays
            ]
        tensors = self._arguments[function]
        for tensor, array in zip(tensors, arrays, strict=True):
            if self.device.type == "cpu":
                np.copyto(np.from_dlpack(tensor), array)
            else:
                tensor.copyfrom(array)
        return tensors

    def _array(self, tensor: Any) -> np.ndarray:
        return np.array(np.from_dlpack(tensor)) if self.device.type == "cpu" else tensor.numpy()

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run on named arrays, see ``__call__``."""
        known = [info.name for info in self.inputs]
        for name in inputs:
            if name not in known:
                raise InputError(f"no input is named {name!r}; the module has {', '.join(known)}")
        missing = [name for name in known if name not in inputs]
        if missing:
            raise InputError(f"input {missing[0]!r} is missing; the module needs {', '.join(known)}")
        return self(*(inputs[name] for name in known))

    def _check(self, info: TensorInfo, value: np.ndarray) -> np.ndarray:
        array = np.asarray(value)
        self._check_kind(info, array.shape, array.dtype)
        if self.check_finite and array.dtype.kind == "f" and not np.isfinite(array).all():
            index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise InputError(
                f"input {info.name!r} is {array[index]} at index {index}; quantized layers need finite values"
            )
        return array

    @staticmethod
    def _check_kind(info: TensorInfo, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if tuple(shape) != info.shape:
            raise InputError(f"input {info.name!r} has shape {tuple(shape)}, the module takes {info.shape}")
        if str(dtype) != info.dtype:
            raise InputError(
                f"input {info.name!r} has dtype {dtype}, the module takes {info.dtype}; "
                f"convert it with .astype({info.dtype!r})"
            )

    def time_evaluator(
        self, inputs: Mapping[str, np.ndarray], repeat: int = 10, number: int = 1
    ) -> list[float]:
        """Seconds per call of the compiled function alone, one figure per repeat."""
        machine = self.virtual_machine
        function, tensors, _ = self._prepared([inputs[info.name] for info in self.inputs])
        machine.set_input(function, *tensors)
        timer = machine.time_evaluator("invoke_stateful", self.device, number=number, repeat=repeat)
        return list(timer(function).results)

    def export_library(self, path: str | os.PathLike, fcompile: Callable | None = None) -> None:
        """Write a shared library (``.so``); nothing is left behind when linking fails.

        ``fcompile`` links it; by default what ``tvm_qfp8.linker`` chooses for the target.

        Raises
        ------
        ModelError
            The module was itself loaded from a file, or the path cannot be written.
        """
        if self._executable is None:
            raise ModelError("a module that was loaded from a file cannot be exported again: copy the file")
        target = Path(path)
        if not target.parent.is_dir():
            raise ModelError(f"cannot write {target}: folder {target.parent} does not exist")
        if fcompile is None and self._target is not None:
            from tvm_qfp8.linker import linker

            fcompile = linker(self._target)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tvm_qfp8_") as folder:
            part = Path(folder) / ("module" + (target.suffix or ".so"))
            options: dict[str, Any] = {} if fcompile is None else {"fcompile": fcompile}
            if self._target is not None and self._target.kind.name == "cuda":
                from tvm_qfp8.cuda_code import packer

                options["fpack_imports"] = packer(self._target)
            with _without_scope_messages():
                self._executable.export_library(str(part), **options)
            os.replace(part, target)


def load(path: str | os.PathLike) -> CompiledModule:
    """Load a module written by ``CompiledModule.export_library``.

    Raises
    ------
    ModelError
        The file is missing, damaged, made for another machine, or not a module of this package.
    """
    from tvm.runtime.vm import VirtualMachine

    if not Path(path).is_file():
        raise ModelError(f"no such module: {path}")
    check_shared_object(path)
    try:
        with _without_scope_messages():
            module = tvm.runtime.load_module(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        if "load_from_bytes.cuda" in reason:
            reason = "it is compiled for an NVIDIA GPU, whose driver this machine lacks"
        raise ModelError(f"cannot load {path}: {reason}") from error
    try:
        metadata = VirtualMachine(module, tvm.cpu())[METADATA_FUNCTION]().numpy()
    except (AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} was not written by tvm_qfp8: it holds no metadata") from error
    compiled = CompiledModule(metadata, module)
    compiled.check_cpu()
    return compiled
