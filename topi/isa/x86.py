"""What the x86 instruction sets share.

Pairs of int16 values are multiplied and added by ``pmaddwd``, with VNNI fours of bytes by ``vpdpbusd``.
"""

from __future__ import annotations

from tvm import tirx

from tvm_qfp8.topi.float_contract import with_lanes
from tvm_qfp8.topi.prim_func import load


def broadcast_pair(lanes: int):
    """Load two neighbouring int16 values as one int32 and repeat them in every lane."""

    def broadcast(buffer, index):
        pair = tirx.reinterpret("int32", buffer.vload([index], "int16x2"))
        return tirx.reinterpret(with_lanes("int16", 2 * lanes), tirx.Broadcast(pair, lanes))

    return broadcast


def multiply_add_by(intrinsic: str, lanes: int):
    """acc + pmaddwd(a, b); LLVM makes one ``vpdpwssd`` of it where the target has VNNI."""

    def multiply_add(acc, a, b):
        products = tirx.call_llvm_intrin(with_lanes("int32", lanes), intrinsic, a, b)
        return acc + products

    return multiply_add


def broadcast_four(lanes: int):
    """Load four neighbouring bytes as one int32 and repeat them in every lane."""

    def broadcast(buffer, index):
        four = tirx.reinterpret("int32", load(buffer, index, 4))
        return tirx.reinterpret(with_lanes("int8", 4 * lanes), tirx.Broadcast(four, lanes))

    return broadcast


def multiply_add_bytes_by(intrinsic: str, lanes: int):
    """acc + a * b over fours of neighbouring bytes, those of ``a`` unsigned; sums wrap around, none saturates."""
    dtype = with_lanes("int32", lanes)

    def multiply_add(acc, a, b):
        return tirx.call_llvm_intrin(dtype, intrinsic, acc, a, b)

    return multiply_add
