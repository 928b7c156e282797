"""QFP8: 8-bit inference with a dynamic-bias float format and interpolated nonlinear layers, on Apache TVM.

Names are resolved on first use, so that importing the package costs little.
"""

from __future__ import annotations

import importlib
from typing import Any

from tvm_qfp8 import tvm_fixes

# Imported here because the function shares its module's name, which importing the module would bind instead.
from tvm_qfp8.quantize import QTensor, quantize

tvm_fixes.apply()

_PUBLIC = {
    "compile": "compiler",
    "Config": "config",
    "lengths_up_to": "lengths",
    "load": "runtime",
    "bundle": "bundling",
    "sensitivity": "analysis",
    "recalibrate_batchnorm": "batchnorm",
    "CompiledModule": "runtime",
    "Report": "report",
    "encode": "format",
    "decode": "format",
    "build_table": "tables",
    "Table": "tables",
    "QFP8Error": "errors",
}

__all__ = sorted([*_PUBLIC, "QTensor", "quantize"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "torch":
        return importlib.import_module("tvm_qfp8.torch")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tvm_qfp8' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tvm_qfp8.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
