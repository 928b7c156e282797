"""Tensor cores of Hopper GPUs (sm_90a): a product of four warps that runs beside other instructions.

``wgmma`` multiplies 64 x 16 by 16 x ``columns`` float16, or 64 x 32 by 32 x ``columns`` int8. The left operand comes
from registers, in the places of ``device.mma``, a warp having 16 of the rows. The right one lies in shared memory: 128
bytes for each column, four products' worth, whose eight chunks of 16 bytes are at ``chunk ^ (column % 8)`` ("128-byte
swizzle"; PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"), so that no two columns share a bank.
"""

from __future__ import annotations

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call

ROW_BYTES = 128
"""Of a column in shared memory."""
ALIGNMENT = 1024
"""Of such rows: the swizzle is one of address bits."""

_ADDRESS = f"""
__forceinline__ __device__ unsigned qfp8_shared_address(void* p) {{
  unsigned address;
  asm volatile("{{.reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t;}}" : "=r"(address) : "l"(p));
  return (address + {ALIGNMENT - 1}u) & ~{ALIGNMENT - 1}u;
}}
"""
_STORE = """
__forceinline__ __device__ void qfp8_store_chunk(unsigned address, unsigned x, unsigned y, unsigned z, unsigned w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
"""
_WORDS = (
    """
__forceinline__ __device__ void qfp8_store_word(unsigned address, int value) {
  asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}
""",
    """
__forceinline__ __device__ int qfp8_load_word(unsigned address) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
""",
    """
__forceinline__ __device__ void qfp8_add_word(unsigned address, int value) {
  asm volatile("red.shared.add.s32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}
""",
)
# The tensor cores read what was stored through another path, hence the fence.
_PUBLISH = """
__forceinline__ __device__ void qfp8_publish() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}
"""
_BEGIN = """
__forceinline__ __device__ void qfp8_begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
"""
_END = """
__forceinline__ __device__ void qfp8_end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
"""
_COPY = """
__forceinline__ __device__ void qfp8_copy_chunk(unsigned address, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(__cvta_generic_to_global(source))
               : "memory");
}
"""
_COPIED = """
__forceinline__ __device__ void qfp8_end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
"""


def _wait_source(pending: int) -> str:
    return f"""
__forceinline__ __device__ void qfp8_await_products_{pending}() {{
  asm volatile("wgmma.wait_group.sync.aligned {pending};" ::: "memory");
}}
"""


def _wait_for_copies_source(pending: int) -> str:
    return f"""
__forceinline__ __device__ void qfp8_await_copies_{pending}() {{
  asm volatile("cp.async.wait_group {pending};" ::: "memory");
}}
"""


def _product_source(columns: int, kind: str) -> str:
    """``kind`` of the left operand: f16, s8 or u8; the right one is then f16 or s8."""
    count = columns // 2
    half = kind == "f16"
    depth, kinds = (16, "f32.f16.f16") if half else (32, f"s32.{kind}.s8")
    sums = ",".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+{"f" if half else "r"}"(c[{i}])' for i in range(count))
    left = ",".join(f"%{count + i}" for i in range(4))
    # The right operand is described by its address, row groups of 1024 bytes, and 128-byte swizzle.
    return f"""
__forceinline__ __device__ void qfp8_wgmma_{kind}_{columns}({"float" if half else "int"}* c, unsigned a0, unsigned a1,
                                                  unsigned a2, unsigned a3, unsigned right) {{
  unsigned long long b = (right & 0x3FFFFu) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
  asm volatile("{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.{kinds} "
               "{{{sums}}},{{{left}}},%{count + 4},p{",1,1,0" if half else ""};\\n}}"
               : {outputs} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}}
"""


def shared_address(buffer):
    """The first aligned address of a buffer in shared memory, uint32."""
    return cuda_func_call(
        "qfp8_shared_address", tirx.address_of(buffer[0]), source_code=_ADDRESS, return_type="uint32"
    )


def store_chunk(address, values: list):
    """Store four uint32."""
    return cuda_func_call("qfp8_store_chunk", address, *values, source_code=_STORE, return_type="void")


def store_word(address, value):
    """Store an int32."""
    return cuda_func_call("qfp8_store_word", address, value, source_code=_WORDS[0], return_type="void")


def load_word(address):
    """An int32 that the same thread stored."""
    return cuda_func_call("qfp8_load_word", address, source_code=_WORDS[1], return_type="int32")


def add_word(address, value):
    """Add to an int32."""
    return cuda_func_call("qfp8_add_word", address, value, source_code=_WORDS[2], return_type="void")


def publish():
    """Let tensor cores see what all threads have stored."""
    return cuda_func_call("qfp8_publish", source_code=_PUBLISH, return_type="void")


def begin_products():
    """Before products that use registers written since the last ones."""
    return cuda_func_call("qfp8_begin_products", source_code=_BEGIN, return_type="void")


def end_products():
    """The products since the last call are one group."""
    return cuda_func_call("qfp8_end_products", source_code=_END, return_type="void")


def await_products(pending: int):
    """Wait until at most ``pending`` groups are unfinished."""
    source = _wait_source(pending)
    return cuda_func_call(f"qfp8_await_products_{pending}", source_code=source, return_type="void")


def copy_chunk(address, source):
    """Begin to copy 16 bytes of global memory, a pointer, to shared memory."""
    return cuda_func_call("qfp8_copy_chunk", address, source, source_code=_COPY, return_type="void")


def end_copies():
    """The copies since the last call are one group."""
    return cuda_func_call("qfp8_end_copies", source_code=_COPIED, return_type="void")


def await_copies(pending: int):
    """Wait until at most ``pending`` groups of copies are unfinished."""
    source = _wait_for_copies_source(pending)
    return cuda_func_call(f"qfp8_await_copies_{pending}", source_code=source, return_type="void")


def product(columns: int, sums, left: list, right, kind: str = "f16"):
    """Add to ``sums``, ``columns / 2`` float32 of each thread, the product with 16 values of each column.

    With ``kind`` s8 or u8 sums are int32, the left operand is that, and the right one 32 int8 of each column.
    """
    pointer, source = tirx.address_of(sums[0]), _product_source(columns, kind)
    return cuda_func_call(
        f"qfp8_wgmma_{kind}_{columns}", pointer, *left, right, source_code=source, return_type="void"
    )
