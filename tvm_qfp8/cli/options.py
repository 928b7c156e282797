"""Values given on the command line: shapes, inputs, calibration data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tvm_qfp8.errors import CalibrationError, InputError
from tvm_qfp8.lengths import lengths_up_to

if TYPE_CHECKING:
    import numpy as np

    from tvm_qfp8.importers import Extent

ShapeOption = Annotated[
    list[str] | None,
    typer.Option("--input-shape", "-s", help="NAME=1,3,224,224 where an .onnx leaves dimensions open."),
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", help="NAME=NUMBER or NAME=FILE.npy: an input that becomes a constant."),
]

EXTENT = re.compile(r"(\.\.)?[1-9]\d*|[1-9]\d*(/[1-9]\d*)+")
"""``16``, ``..64`` or ``16/32/64``."""


def parse_shapes(texts: list[str]) -> dict[str, tuple[Extent, ...]]:
    """``["name=1,3,224,224"]`` as ``{"name": (1, 3, 224, 224)}``.

    The first extent may be a name, for an open batch; any may be lengths to choose from, ``16/32/64``, or ``..64`` for
    all up to one (``lengths_up_to``).

    Raises
    ------
    typer.BadParameter
        Anything else.
    """
    shapes: dict[str, tuple[Extent, ...]] = {}
    for text in texts:
        name, equals, extents = text.rpartition("=")
        parts = [part.strip() for part in extents.replace("x", ",").split(",")]
        open_batch = len(parts) > 1 and parts[0].isidentifier()
        batch: list[Extent] = [parts.pop(0)] if open_batch else []
        if not equals or not name or not all(map(EXTENT.fullmatch, parts)):
            raise typer.BadParameter(f"{text!r} is not NAME=EXTENT,EXTENT,... as in image=1,3,224,224")
        shapes[name] = (*batch, *map(_extent, parts))
    return shapes


def _extent(text: str) -> Extent:
    if text.startswith(".."):
        return lengths_up_to(int(text[2:]))
    return [int(length) for length in text.split("/")] if "/" in text else int(text)


def parse_params(texts: list[str]) -> dict[str, float | np.ndarray]:
    """``["sr=16000", "mask=mask.npy"]`` as ``{"sr": 16000.0, "mask": array}``.

    Raises
    ------
    typer.BadParameter
        Anything else.
    InputError
        A file is missing or is no array file.
    """
    params: dict[str, float | np.ndarray] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=NUMBER or NAME=FILE.npy, as in sr=16000")
        try:
            params[name] = float(value)
        except ValueError:
            params[name] = _read_one(Path(value))
    return params


def read_inputs(texts: list[str]) -> dict[str, np.ndarray]:
    """Arrays from ``NAME=FILE.npy`` or ``FILE.npz`` (all arrays of the file under their names).

    Raises
    ------
    InputError
        A file is missing or is no array file.
    """
    arrays: dict[str, np.ndarray] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if equals:
            arrays[name] = _read_one(Path(file))
        elif text.endswith(".npz"):
            arrays.update(_read_archive(Path(text)))
        else:
            raise typer.BadParameter(f"{text!r} is neither NAME=FILE.npy nor FILE.npz")
    return arrays


def calibration_data(path: Path | None) -> Path | Iterator[dict[str, np.ndarray]] | None:
    """What ``compile`` takes as calibration: an .npz file as it is, a folder as a stream of its .npz files.

    Raises
    ------
    CalibrationError
        The path does not exist, or the folder holds no .npz file.
    """
    if path is None:
        return None
    if not path.exists():
        raise CalibrationError(f"no such calibration file or folder: {path}")
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.npz"))
    if not files:
        raise CalibrationError(
            f"folder {path} holds no .npz file; each should hold one sample, an array for each input of the model"
        )
    return (_read_archive(file) for file in files)


def _read_one(path: Path) -> np.ndarray:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"cannot read {path}: {_reason(error)}; expected a file written by numpy.save"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(
            f"{path} holds several arrays ({', '.join(array.files)}); give the .npz file without a name"
        )
    return array


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"cannot read {path}: {_reason(error)}; expected a file written by numpy.savez"
        ) from error


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
