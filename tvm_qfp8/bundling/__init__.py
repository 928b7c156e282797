"""Folders that hold all a board needs to run a module without a Python package."""

from tvm_qfp8.bundling.bundle import bundle

__all__ = ["bundle"]
