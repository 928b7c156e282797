"""A function of 8-bit codes: a look-up in its 256 results, codes or float32, exact.

256 bytes stand in vector registers: four of AVX-512 (``vpermi2b``), sixteen of NEON (four ``tbl`` of 64 bytes each),
or sixteen times 16 bytes by ``vpshufb``. float32 results, and machines without these, read the table in cache.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvm_qfp8.topi.cuda.launch import for_each
from tvm_qfp8.topi.float_contract import bind, like
from tvm_qfp8.topi.isa import InstructionSet
from tvm_qfp8.topi.panels import overlapped_start
from tvm_qfp8.topi.prim_func import TensorSpec, build_prim_func, load, store, vector_runs

CODES = 256
CHUNK = 32_768
"""Codes that one thread takes at a time."""


def look_up_prim_func(isa: InstructionSet, threads: int, shape: tuple[int, ...], dtype: str) -> tirx.PrimFunc:
    """``(codes, table, result) -> None``: ``result[i] = table[codes[i]]``, ``dtype`` uint8 or float32."""
    codes, result = TensorSpec(shape, "uint8"), TensorSpec(shape, dtype)
    chunk = min(codes.size, CHUNK)
    lanes, form = _form(isa) if dtype == "uint8" else (1, None)

    def body(source, table, target) -> None:
        def single(at) -> None:
            place = bind(load(source, at, 1).astype("int32"))
            store(target, at, load(table, place, 1), 1)

        if isa.name == "cuda":
            for_each(codes.size, single)
            return
        parallel = threads > 1 and codes.size > CHUNK
        with (T.parallel if parallel else T.serial)(0, -(-codes.size // chunk)) as index:
            start = overlapped_start(index, chunk, codes.size)
            if form is None or chunk < lanes:
                with T.serial(0, chunk) as i:
                    single(start + i)
                return
            look_up = form(table)

            def vector(offset, count: int) -> None:
                store(target, start + offset, look_up(bind(load(source, start + offset, count))), count)

            vector_runs(chunk, lanes, vector)

    return build_prim_func("look_up_codes", [codes, TensorSpec((CODES,), dtype), result], body)


def _form(isa: InstructionSet) -> tuple[int, Callable | None]:
    """Codes that are looked up at once, and ``form(table)(codes)``."""
    if isa.byte_permute and isa.name == "avx512":
        return 64, _permutes
    if isa.name in ("avx512", "avx2"):
        return 32, _byte_shuffles
    if isa.name == "neon":
        return 16, _table_lookups
    return 1, None


def _permutes(table) -> Callable:
    """AVX512-VBMI: two tables of 128 bytes, read by the low seven bits; the eighth chooses."""
    parts = [bind(load(table, start, 64)) for start in range(0, CODES, 64)]

    def look_up(codes):
        low, high = (
            bind(tirx.call_llvm_intrin("uint8x64", "llvm.x86.avx512.vpermi2var.qi.512", a, codes, b))
            for a, b in (parts[:2], parts[2:])
        )
        return tirx.Select(codes < like(128, codes, "uint8"), low, high)

    return look_up


def _byte_shuffles(table) -> Callable:
    """AVX2: ``vpshufb`` reads 16 bytes by the low four bits, and gives 0 where the eighth is set."""
    order = [tirx.const(lane, "int32") for lane in range(32)]
    parts = [bind(tirx.Shuffle([bind(load(table, start, 16))] * 2, order)) for start in range(0, CODES, 16)]

    def look_up(codes):
        found = None
        for high, part in enumerate(parts):
            # 0 to 15 where this part is meant; what is more gets its eighth bit by the saturating addition.
            low = bind(codes ^ like(16 * high, codes, "uint8"))
            place = tirx.call_llvm_intrin("uint8x32", "llvm.uadd.sat", low, like(0x70, codes, "uint8"))
            value = tirx.call_llvm_intrin("uint8x32", "llvm.x86.avx2.pshuf.b", part, bind(place))
            found = bind(value) if found is None else bind(found | value)
        return found

    return look_up


def _table_lookups(table) -> Callable:
    """NEON: ``tbl`` reads 64 bytes, and gives 0 beyond them."""
    parts = [bind(load(table, start, 16)) for start in range(0, CODES, 16)]

    def look_up(codes):
        found = None
        for quarter in range(4):
            place = bind(codes ^ like(64 * quarter, codes, "uint8"))
            registers = parts[4 * quarter : 4 * quarter + 4]
            value = tirx.call_llvm_intrin("uint8x16", "llvm.aarch64.neon.tbl4", *registers, place)
            found = bind(value) if found is None else bind(found | value)
        return found

    return look_up
