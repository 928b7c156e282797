#!/usr/bin/env python3
"""Runs the network of the bundle that this file lies in. Needs numpy only.

    python3 run.py INPUT.npy ...     inputs in the order of manifest.txt; outputs go to output_0.npy ...

Or from a program: ``Model(folder)(array, ...)`` returns a list of arrays.
"""

import ctypes
import hashlib
import platform
import sys
import time
from pathlib import Path

import numpy as np

INT, TENSOR = 1, 70
DTYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


def machine() -> str:
    """What programs of this machine are made for; a 32-bit system may run on a 64-bit kernel."""
    name = platform.machine()
    return "armv7l" if name in ("aarch64", "armv8l") and sys.maxsize < 2**32 else name


def has_feature(text: str) -> bool:
    """Whether the CPU has "NAME", a word of /proc/cpuinfo, or "NAME ENTRY BIT" of the auxiliary vector."""
    name, *place = text.split()
    if place:
        get = ctypes.CDLL(None).getauxval
        get.restype = ctypes.c_ulong
        return bool(get(ctypes.c_ulong(int(place[0]))) >> int(place[1]) & 1)
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return flags is None or name in flags


class Any(ctypes.Structure):
    """TVMFFIAny: a type index and eight bytes of value."""

    _fields_ = [("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64)]


class Bytes(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class ManagedTensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


# The memory belongs to NumPy, so there is nothing to delete.
KEEP = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)


class Runtime:
    """The C interface of TVM's runtime."""

    def __init__(self, folder: Path) -> None:
        self.ffi = ctypes.CDLL(str(folder / "libtvm_ffi.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)

    def check(self, status: int) -> None:
        if status == 0:
            return
        error = ctypes.c_void_p()
        self.ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
        # The object's header has 24 bytes; kind and message follow as byte arrays.
        kind, message = (Bytes.from_address(int(error.value or 0) + 24 + 16 * i) for i in range(2))
        texts = [ctypes.string_at(part.data, part.size).decode() for part in (kind, message)]
        raise RuntimeError(": ".join(texts))

    def function(self, name: str) -> int:
        handle = ctypes.c_void_p()
        text = name.encode()
        self.check(
            self.ffi.TVMFFIFunctionGetGlobal(ctypes.byref(Bytes(text, len(text))), ctypes.byref(handle))
        )
        return int(handle.value or 0)

    def call(self, function: int, *arguments: Any) -> Any:
        values, result = (Any * len(arguments))(*arguments), Any()
        count = ctypes.c_int32(len(arguments))
        self.check(
            self.ffi.TVMFFIFunctionCall(ctypes.c_void_p(function), values, count, ctypes.byref(result))
        )
        return result

    def text(self, value: str) -> Any:
        raw = value.encode()
        result = Any()
        self.check(
            self.ffi.TVMFFIStringFromByteArray(ctypes.byref(Bytes(raw, len(raw))), ctypes.byref(result))
        )
        return result

    def tensor(self, array: np.ndarray) -> tuple:
        """(Any, what must stay alive while it is used); the memory is aligned as kernels expect."""
        room = np.empty(array.nbytes + 128, np.uint8)
        start = -room.ctypes.data % 64
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        code, bits = DTYPE_CODES[array.dtype.kind], array.dtype.itemsize * 8
        tensor = Tensor(room.ctypes.data + start, 1, 0, array.ndim, code, bits, 1, shape, None, 0)
        managed = ManagedTensor(tensor, None, ctypes.cast(KEEP, ctypes.c_void_p))
        handle = ctypes.c_void_p()
        self.check(self.ffi.TVMFFITensorFromDLPack(ctypes.byref(managed), 64, 1, ctypes.byref(handle)))
        return Any(TENSOR, 0, handle.value), (room, shape, managed)

    def release(self, value: Any) -> None:
        """Give an object back; values below 64 are no objects."""
        if value.type_index >= 64:
            self.check(self.ffi.TVMFFIObjectDecRef(ctypes.c_void_p(value.value)))

    def array(self, value: Any) -> np.ndarray:
        """A copy of a tensor, which is given back."""
        pointer = ctypes.POINTER(ManagedTensor)()
        handle = ctypes.c_void_p(value.value)
        self.check(self.ffi.TVMFFITensorToDLPack(handle, ctypes.byref(pointer)))
        tensor = pointer.contents.tensor
        shape = [tensor.shape[axis] for axis in range(tensor.ndim)]
        kind = next(kind for kind, code in DTYPE_CODES.items() if code == tensor.code)
        dtype = np.dtype(bool if kind == "b" else f"{kind}{tensor.bits // 8}")
        size = int(np.prod(shape)) * dtype.itemsize
        data = ctypes.string_at(tensor.data + tensor.byte_offset, size)
        deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(ManagedTensor))(pointer.contents.deleter)
        deleter(pointer)
        self.release(value)
        return np.frombuffer(data, dtype).reshape(shape).copy()


class Model:
    """A bundle's network.

    ``programs`` are (function, inputs, outputs), one for each length that it is compiled for, the longest last; inputs
    and outputs are (name, dtype, shape). ``inputs`` and ``outputs`` are those of the longest.
    """

    def __init__(self, folder) -> None:
        folder = Path(folder)
        self.programs: list = []
        self._read_manifest(folder)
        _, self.inputs, self.outputs = self.programs[-1]
        self.runtime = Runtime(folder / "lib")
        load = self.runtime.function("ffi.ModuleLoadFromFile")
        self.machine = self.runtime.call(load, self.runtime.text(str(folder / "model.so")))
        self.machine = self.runtime.call(self._member("vm_load_executable"))
        self.runtime.call(self._member("vm_initialization"), *(Any(INT, 0, number) for number in (1, 0, 2)))
        load = self._member("qfp8_load")
        if load:  # fills what kernels keep in memory; without it the first call does
            self.runtime.release(self.runtime.call(load))
        self.functions = {function: self._member(function) for function, _, _ in self.programs}

    def _member(self, name: str) -> int:
        get = self.runtime.function("ffi.ModuleGetFunction")
        return self.runtime.call(get, self.machine, self.runtime.text(name), Any(2, 0, 1)).value

    def _read_manifest(self, folder: Path) -> None:
        if not (folder / "manifest.txt").is_file():
            raise RuntimeError(f"{folder} is no bundle: it has no manifest.txt")
        data = (folder / "manifest.txt").read_bytes()
        text, _, digest = data.rpartition(b"end ")
        lines = [line.partition(" ")[::2] for line in data.decode(errors="replace").splitlines()]
        found = dict(lines)
        if found.get("format", "2") != "2":
            raise RuntimeError(f"manifest.txt has format {found['format']}, this runner reads format 2")
        if hashlib.sha256(text).hexdigest().encode() != digest.strip():
            raise RuntimeError("manifest.txt was changed or cut off; copy the bundle again")
        made_for = found["target"].split()[0]
        if made_for != machine():
            raise RuntimeError(f"the bundle is made for {made_for}, this machine is {machine()}")
        missing = [rest.split()[0] for kind, rest in lines if kind == "feature" and not has_feature(rest)]
        if missing:
            raise RuntimeError(
                f"the network is compiled for {found['target'].split(' ', 1)[1]} and uses {', '.join(missing)}, which "
                "this CPU does not have; compile it for this board"
            )
        for kind, rest in lines:
            if kind == "file":
                self._check_file(folder, *rest.split(" ", 1))
            elif kind == "program":
                self.programs.append((rest, [], []))
            elif kind in ("input", "output"):
                dtype, rank, rest = rest.split(" ", 2)
                *shape, name = rest.split(" ", int(rank))
                self.programs[-1][1 if kind == "input" else 2].append((name, dtype, tuple(map(int, shape))))

    @staticmethod
    def _check_file(folder: Path, digest: str, name: str) -> None:
        if not (folder / name).is_file():
            raise RuntimeError(f"{name} is missing; copy the bundle again")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise RuntimeError(
                f"{name} does not fit manifest.txt: it was changed or damaged; copy the bundle again"
            )

    def __call__(self, *arrays: np.ndarray) -> list:
        if len(arrays) != len(self.inputs):
            raise ValueError(f"{len(arrays)} arrays given, the network has {len(self.inputs)} inputs")
        given = [(str(array.dtype), array.shape) for array in arrays]
        fitting = [program for program in self.programs if given == [input[1:] for input in program[1]]]
        if not fitting:
            pairs = zip(self.inputs, given)
            (name, dtype, shape), (kind, found) = next(pair for pair in pairs if pair[0][1:] != pair[1])
            raise ValueError(f"input {name} is {dtype} {shape}, not {kind} {found}")
        ((function, _, outputs),) = fitting
        tensors = [self.runtime.tensor(array) for array in arrays]
        result = self.runtime.call(self.functions[function], *(tensor for tensor, _ in tensors))
        for tensor, _ in tensors:
            self.runtime.release(tensor)
        if result.type_index == TENSOR:
            return [self.runtime.array(result)]
        item = self.runtime.function("ffi.ArrayGetItem")
        parts = [self.runtime.call(item, result, Any(INT, 0, i)) for i in range(len(outputs))]
        self.runtime.release(result)
        return [self.runtime.array(part) for part in parts]


def main() -> int:
    model = Model(Path(__file__).resolve().parent)
    if len(sys.argv) - 1 != len(model.inputs):
        print("usage: run.py", *(f"{name}.npy" for name, _, _ in model.inputs), file=sys.stderr)
        return 2
    arrays = [np.load(path) for path in sys.argv[1:]]
    started = time.perf_counter()
    outputs = model(*arrays)
    elapsed = time.perf_counter() - started
    for index, ((name, _, _), output) in enumerate(zip(model.outputs, outputs)):
        np.save(f"output_{index}.npy", output)
        print(f"{name} -> output_{index}.npy")
    print(f"{elapsed * 1e3:.3f} ms")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"run.py: {error}")
