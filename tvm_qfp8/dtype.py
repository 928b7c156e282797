"""The layouts as data types of TVM's IR: ``custom[qfp8_e2m5]8``, ``custom[qfp8_ue2m6]8`` ...

Importing this module registers them, after which ``R.Tensor((m, k), "custom[qfp8_e2m5]8")`` and
``T.Cast("float32", W[i, k])`` are accepted. A value of such a type is the *grid value* of a code (see
``tvm_qfp8.format``): a cast to another type gives that number, a cast from float32 rounds to the grid. Scales are
ordinary tensors, multiplied outside. ``relay_passes.lower_dtype`` turns all of it into bytes and arithmetic, and has
to run before tuning and code generation.

TVM 0.27 prints such a type without its 8 bits and reads it back with 32: pass every script or JSON text through
:func:`fix_text` before loading it.
"""

from __future__ import annotations

import re

import numpy as np
import tvm
import tvm_ffi

from tvm_qfp8.errors import InputError
from tvm_qfp8.format import LAYOUTS, Layout

FIRST_TYPE_CODE = 150
"""Type codes above 128 are free for custom types; ours are ``FIRST_TYPE_CODE + position in LAYOUTS``."""

_CODE_OF_NAME = {f"qfp8_{name.lower()}": FIRST_TYPE_CODE + i for i, name in enumerate(LAYOUTS)}
_NAME_OF_CODE = {code: name for name, code in _CODE_OF_NAME.items()}
_LAYOUT_OF_CODE = {FIRST_TYPE_CODE + i: layout for i, layout in enumerate(LAYOUTS.values())}

_WITHOUT_BITS = re.compile(r"custom\[(qfp8_\w+)\](?!\d)")
# TVMScript prints the type of a bound scalar as T.custom[...], which is no Python name; the value implies it.
_LET_TYPE = re.compile(r"T\.let\[T\.custom\[qfp8_\w+\](x\d+)?\]")


def register() -> None:
    """Register the data types with TVM; calling it again changes nothing."""
    tvm_ffi.register_global_func("dtype.get_custom_type_code", _type_code, override=True)
    tvm_ffi.register_global_func("dtype.get_custom_type_name", _type_name, override=True)


def _type_code(name: str) -> int:
    if str(name) not in _CODE_OF_NAME:
        raise InputError(f"data type custom[{name}] is not known; known are {', '.join(_CODE_OF_NAME)}")
    return _CODE_OF_NAME[str(name)]


def _type_name(code: int) -> str:
    if int(code) not in _NAME_OF_CODE:
        raise InputError(f"custom type code {code} is not known; known are {sorted(_NAME_OF_CODE)}")
    return _NAME_OF_CODE[int(code)]


register()


def layout_of(dtype: object) -> Layout | None:
    """The layout of a TVM data type (name or ``tvm.DataType``, any number of lanes); None for an ordinary type."""
    found = dtype if isinstance(dtype, tvm.DataType) else tvm.DataType(str(dtype))
    return _LAYOUT_OF_CODE.get(found.type_code)


def fix_text(text: str) -> str:
    """A TVMScript or JSON text in which every QFP8 type names its 8 bits, so that it loads as it was saved."""
    return _WITHOUT_BITS.sub(r"custom[\1]8", _LET_TYPE.sub("T.let", text))


def codes_tensor(codes: np.ndarray, layout: Layout) -> tvm.runtime.Tensor:
    """uint8 codes as a TVM tensor of the layout's data type (a view, where ``codes`` is contiguous)."""
    stored = tvm.runtime.tensor(np.ascontiguousarray(codes))
    return stored._create_view(codes.shape, layout.ir_dtype)


def tensor_codes(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """The uint8 codes held by a TVM tensor of a QFP8 data type (NumPy cannot read that type itself)."""
    return tensor._create_view(tensor.shape, "uint8").numpy()
