"""Repairs of apache-tvm 0.27 in Python's own library, applied once.

TVM's script decorators call ``inspect.stack()``. For every frame without a file on disk, as those of the import
machinery, ``inspect.getmodule`` then walks all of ``sys.modules``: importing ``tvm.s_tir.tensor_intrin`` takes half a
minute, longer than MetaSchedule's builders are given, so that no candidate is ever built.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType, ModuleType
from typing import Any

_search = inspect.getmodule


def _getmodule(object: Any, _filename: str | None = None) -> ModuleType | None:  # noqa: A002 - inspect's own name
    """``inspect.getmodule``; a frame's module is looked up by the name that its globals hold."""
    if isinstance(object, FrameType):
        return sys.modules.get(object.f_globals.get("__name__", ""))
    return _search(object, _filename)


def apply() -> None:
    """Make TVM's script decorators fast in this process; calling it again changes nothing."""
    inspect.getmodule = _getmodule
