"""Times CUDA kernels on a GPU against torch's float16 (cuBLAS), int8 and fp8, and against a plain copy.

Contestants take turns; every figure is the median over the turns, every ratio the median of the turns' ratios. Weights
of the batch-1 layers rotate through more memory than the caches hold. Sums are compared with the NumPy twin first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cuda_bench.models import whole_models
from cuda_bench.timing import figures, seconds

REPOSITORY = Path(__file__).resolve().parent.parent
GEMMS = ((4096, 4096, 4096), (1024, 4096, 1024), (512, 768, 3072))
GEMV = (1, 4096, 4096)
FEW = ((64, 384, 1536), (64, 1536, 384))
"""Layers of a small transformer: rows, depth, columns."""
LAYOUTS = (("E1M6", "E1M6"), ("E2M5", "E2M5"), ("E3M4", "E2M5"))
"""Of activations and weights: int8, and two whose sums leave float32 to stay exact, those of the last more often."""
ROTATION = 2**28
"""Bytes that rotating operands fill."""
ELEMENTS = 2**26
BARS = (
    ("gemv", "share_of_copy", 0.8),
    ("gemv", "times_float16", 1.8),
    ("gemm", "times_float16", 0.8),
    ("gelu", "share_of_copy", 0.8),
    ("softmax", "share_of_copy", 0.8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "bench_cuda.json")
    parser.add_argument("--modules", type=Path, help="folder that scripts/cuda_build.py --keep has filled")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError as error:
        raise SystemExit("bench cuda: needs torch with CUDA") from error
    if not torch.cuda.is_available():
        raise SystemExit("bench cuda: no GPU that torch can use on this machine")
    from zoo.machine import describe_machine

    bandwidth = copy_bandwidth(torch, arguments.turns)
    rows = [
        linear(torch, *shape, layouts, arguments.turns, bandwidth)
        for shape in (GEMV, *FEW, *GEMMS)
        for layouts in LAYOUTS
    ]
    rows.append(plain_read(torch, arguments.turns, bandwidth))
    rows += [pointwise(torch, name, arguments.turns, bandwidth) for name in ("gelu", "softmax")]
    record = {
        "machine": describe_machine(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
        "models": whole_models(torch, arguments.modules) if arguments.modules else [],
        "bars": [found for bar in BARS for found in check(rows, *bar)],
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["bars"], indent=1))


def check(rows: list[dict[str, Any]], kind: str, figure: str, asked: float) -> list[dict[str, Any]]:
    """The worst row of a kind, for each layout of activations, against what is asked of it."""
    worst: dict[str, float] = {}
    for row in rows:
        if row["kind"] == kind:
            layout = row.get("activations", "float32")
            worst[layout] = min(row[figure], worst.get(layout, row[figure]))
    return [
        {
            "kind": kind,
            "activations": layout,
            "figure": figure,
            "found": found,
            "asked": asked,
            "met": found >= asked,
        }
        for layout, found in worst.items()
    ]


def copy_bandwidth(torch: Any, turns: int) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(ROTATION, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = seconds(torch, {"copy": lambda _: target.copy_(source)}, turns, 8)["copy"]
    return 2 * ROTATION / statistics.median(times)


def plain_read(torch: Any, turns: int, bandwidth: float) -> dict[str, Any]:
    """What a kernel takes that only reads as many bytes as the batch-1 layer's weights: no such layer can be faster."""
    import tvm

    from tvm_qfp8.topi.cuda.gemm import words_of
    from tvm_qfp8.topi.cuda.launch import for_each
    from tvm_qfp8.topi.prim_func import TensorSpec, load, store

    size = GEMV[1] * GEMV[2]

    def body(source, result) -> None:
        from tvm import tirx
        from tvm.tirx.script.builder import ir as T

        words = words_of(source, size)

        def one(index) -> None:
            values = T.alloc_buffer((4,), "uint32", scope="local")
            store(values, 0, load(words, index * 4, 4), 4)
            mixed = T.bind(load(values, 0, 1) ^ load(values, 1, 1) ^ load(values, 2, 1) ^ load(values, 3, 1))
            with T.If(tirx.reinterpret("int32", mixed) == 0x12345678):  # never, but a compiler cannot know
                with T.Then():
                    store(result, 0, mixed, 1)

        for_each(size // 16, one)

    call = build("plain_read", [TensorSpec((size,), "uint8"), TensorSpec((1,), "uint32")], body)
    sources = [
        torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda") for _ in range(ROTATION // size)
    ]
    views = [tvm.runtime.from_dlpack(t) for t in sources]
    result = tvm.runtime.from_dlpack(torch.zeros(1, dtype=torch.int32, device="cuda").view(torch.uint32))
    times = seconds(torch, {"ours": lambda i: call(views[i % len(views)], result)}, turns)
    share = size / statistics.median(times["ours"]) / bandwidth
    return {"kind": "plain read", "bytes": size, "share_of_copy": share} | figures(times)


def gpu_target() -> Any:
    """The GPU's architecture as a target; its kernels are compiled as exported ones are."""
    import tvm

    from tvm_qfp8.cuda_code import register_compiler
    from tvm_qfp8.targets import parse_target

    target = parse_target("cuda -arch=sm_" + tvm.cuda(0).compute_version.replace(".", ""))
    register_compiler(target)
    return target


def build(name: str, specs: list, body: Callable) -> Callable:
    """A kernel of ``topi.cuda`` on tensors of torch."""
    import tvm

    from tvm_qfp8.topi.cuda.arithmetic import for_cuda
    from tvm_qfp8.topi.prim_func import build_prim_func

    function = for_cuda(build_prim_func(name, specs, body)).with_attr("global_symbol", name)
    return tvm.compile(tvm.IRModule({name: function}), target=gpu_target())[name]


def linear(
    torch: Any, rows: int, depth: int, columns: int, names: tuple[str, str], turns: int, bandwidth: float
) -> dict[str, Any]:
    """A dense layer, codes to float32, against float16 and 8-bit matrix products of torch."""
    import tvm

    from tvm_qfp8.format import get_layout
    from tvm_qfp8.quantize import quantize
    from tvm_qfp8.topi import reference
    from tvm_qfp8.topi.conv2d import ConvShape
    from tvm_qfp8.topi.cuda.gemv import GemvPlan
    from tvm_qfp8.topi.cuda.linear import linear_kernel
    from tvm_qfp8.topi.prim_func import TensorSpec, store

    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, depth), (columns, depth)))
    layouts = get_layout(names[0]), get_layout(names[1])
    x_codes = quantize(x, layout=names[0], bias="max").codes
    codes = quantize(w, axis=0, layout=names[1], bias="max").codes
    extents = (1, 1, rows, depth, columns)
    shape = ConvShape(*extents, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, *layouts)
    hopper = gpu_target().attrs["arch"] == "sm_90a"
    plan, packed, emit = linear_kernel(shape, codes.reshape(columns, 1, 1, depth), hopper)

    def body(source, weights, result) -> None:
        def write(value, row, column, _valid) -> None:
            store(result, row * columns + column, value.astype("float32"), 1)

        emit(plan, source, weights, write)

    specs = [TensorSpec(a.shape, "uint8") for a in (x_codes, packed)]
    call = build("linear", [*specs, TensorSpec((rows, columns), "float32")], body)
    copies = max(1, ROTATION // packed.nbytes) if isinstance(plan, GemvPlan) else 1
    ours = [torch.from_numpy(packed).cuda() for _ in range(copies)]
    halves = [torch.from_numpy(w).cuda().half().t() for _ in range(copies)]
    left, result = torch.from_numpy(x_codes).cuda(), torch.empty((rows, columns), device="cuda")
    tensors = [tvm.runtime.from_dlpack(t) for t in (left, result)]
    weights = [tvm.runtime.from_dlpack(t) for t in ours]
    call(tensors[0], weights[0], tensors[1])
    torch.cuda.synchronize()
    some = slice(0, None, max(1, rows // 64))
    expected = reference.matmul(x_codes[some], codes, *layouts).astype(np.float32)
    equal = bool(np.array_equal(result[some].cpu().numpy(), expected))
    half = torch.from_numpy(x).cuda().half()
    contestants: dict[str, Callable[[int], object]] = {
        "ours": lambda i: call(tensors[0], weights[i % copies], tensors[1]),
        "float16": lambda i: half @ halves[i % copies],
    }
    absent = add_peers(torch, contestants, rows, depth, columns)
    times = seconds(torch, contestants, turns)
    print(
        rows,
        depth,
        columns,
        *names,
        equal,
        {k: statistics.median(v) for k, v in times.items()},
        file=sys.stderr,
    )
    return {
        "kind": "gemm" if rows > 64 else "few rows" if rows > 1 else "gemv",
        "shape": [rows, depth, columns],
        "activations": names[0],
        "weights": names[1],
        "equal": equal,
        "share_of_copy": (packed.nbytes + x_codes.nbytes + 4 * rows * columns)
        / statistics.median(times["ours"])
        / bandwidth,
        "absent": absent,
    } | figures(times)


def add_peers(torch: Any, contestants: dict, rows: int, depth: int, columns: int) -> dict[str, str]:
    """torch's int8 and fp8 products, where they take the shape; name -> reason of those that do not."""
    left = torch.randint(-127, 127, (rows, depth), dtype=torch.int8, device="cuda")
    right = torch.randint(-127, 127, (columns, depth), dtype=torch.int8, device="cuda").t()
    float8 = [t.to(torch.float8_e4m3fn) for t in (left.float(), right.t().float())]
    one = torch.ones((), device="cuda")
    peers = {
        "int8": lambda _: torch._int_mm(left, right),
        "fp8": lambda _: torch._scaled_mm(float8[0], float8[1].t(), one, one, out_dtype=torch.float16),
    }
    absent = {}
    for name, call in peers.items():
        try:
            call(0)
            torch.cuda.synchronize()
            contestants[name] = call
        except RuntimeError as error:
            absent[name] = str(error).splitlines()[0]
    return absent


def pointwise(torch: Any, name: str, turns: int, bandwidth: float) -> dict[str, Any]:
    """GELU or softmax over rows of 1024, float32, against torch."""
    import tvm

    from tvm_qfp8.tables import build_table
    from tvm_qfp8.tables.softmax import build_softmax_exp, softmax_exp_error
    from tvm_qfp8.topi.cuda.isa import INSTRUCTION_SET
    from tvm_qfp8.topi.cuda.launch import for_each
    from tvm_qfp8.topi.cuda.rows import emit_softmax
    from tvm_qfp8.topi.interpolate import emit_table
    from tvm_qfp8.topi.prim_func import TensorSpec, load, store

    length = 1024
    exp = build_softmax_exp(softmax_exp_error(1e-3, length))
    gelu = build_table("gelu", max_error=1e-3)

    def softmax_body(x, y) -> None:
        def read(index, offset, _lanes):
            return load(x, index * length + offset, 1)

        def write(index, value, offset, _lanes) -> None:
            store(y, index * length + offset, value, 1)

        rows = ELEMENTS // length
        emit_softmax(rows, length, read, lambda v: emit_table(exp, v, INSTRUCTION_SET), write)

    def gelu_body(x, y) -> None:
        for_each(
            ELEMENTS, lambda i: store(y, i, emit_table(gelu, load(x, i, 1), INSTRUCTION_SET), 1), together=4
        )

    spec = TensorSpec((ELEMENTS // length, length), "float32")
    call = build(name, [spec, spec], softmax_body if name == "softmax" else gelu_body)
    x = torch.randn(spec.shape, device="cuda") * 3
    y = torch.empty_like(x)
    tensors = [tvm.runtime.from_dlpack(t) for t in (x, y)]
    call(*tensors)
    torch.cuda.synchronize()
    values, result = x[:64].cpu().numpy(), y[:64].cpu().numpy()
    from tvm_qfp8.topi import reference

    expected = reference.softmax(values, exp) if name == "softmax" else gelu(values)
    own: Callable = torch.nn.functional.gelu if name == "gelu" else lambda v: torch.softmax(v, -1)
    times = seconds(torch, {"ours": lambda _: call(*tensors), "torch": lambda _: own(x)}, turns, 8)
    return {
        "kind": name,
        "equal": bool(np.array_equal(result, expected)),
        "share_of_copy": 2 * x.nbytes / statistics.median(times["ours"]) / bandwidth,
    } | figures(times)


if __name__ == "__main__":
    main()
