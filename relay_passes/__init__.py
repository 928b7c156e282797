"""Passes over Relax and TIR modules, from the canonical float program to scheduled kernels.

TVM runs a pass through C++ and hands Python's errors on by the name of their class; those that it does not know come
out as ``RuntimeError``. Importing this package makes ours known.
"""

import tvm_ffi

from tvm_qfp8 import errors

for _error in vars(errors).values():
    if isinstance(_error, type) and issubclass(_error, errors.QFP8Error):
        tvm_ffi.register_error(_error)
