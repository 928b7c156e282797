"""How commands speak: errors on one line, progress bars, and files that are never half-written."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tvm_qfp8.errors import ModelError, QFP8Error

Function = TypeVar("Function", bound=Callable[..., Any])


def reports_errors(command: Function) -> Function:
    """A command that ends with one red line and exit code 1 where ``command`` raises a ``QFP8Error``."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except QFP8Error as error:
            message = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True, highlight=False).print(
                f"error: {message}", style="red", markup=False
            )
            raise typer.Exit(1) from error

    return guarded  # type: ignore[return-value]


class StageProgress:
    """One progress bar for each stage that ``compile`` reports; call it with ``(stage, done, total)``.

    A total of 0 means that the number of steps is not known.
    """

    def __init__(self, title: str, quiet: bool) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._whole = self._progress.add_task(title, total=1)
        self._stages: dict[str, Any] = {}

    def __enter__(self) -> StageProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._progress.update(self._whole, completed=1)
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._stages[stage], completed=done, total=total or None)


def check_writable(path: Path) -> None:
    """Refuse an output path before any work is spent on it.

    Raises
    ------
    ModelError
        The folder does not exist or cannot be written, or the path is a folder.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise ModelError(f"cannot write {path}: it is a folder; give a file name")
    if not folder.is_dir():
        raise ModelError(f"cannot write {path}: folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise ModelError(f"cannot write {path}: no permission to write in folder {folder}")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file through a temporary one beside it, so that it appears whole or not at all.

    Raises
    ------
    ModelError
        The file cannot be written.
    """
    check_writable(path)
    part = tempfile.NamedTemporaryFile(dir=path.resolve().parent, prefix=".tvm_qfp8_", delete=False)  # noqa: SIM115
    try:
        with part:
            write(part)
        # A temporary file is its owner's alone; what a user asked for gets the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part.name, 0o666 & ~umask)
        os.replace(part.name, path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        Path(part.name).unlink(missing_ok=True)
