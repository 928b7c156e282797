"""Writes the tables of README.md and of some pages of docs/ from results/*.json and from the code.

``--check`` only says whether they are current.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = tuple(REPOSITORY / name for name in ("README.md", "docs/cuda.md", "docs/amx.md"))
RESULTS = REPOSITORY / "results"


def main() -> int:
    old = False
    for page in PAGES:
        text = page.read_text()
        current = fill(text)
        old |= current != text
        if "--check" not in sys.argv[1:]:
            page.write_text(current)
    return int(old) if "--check" in sys.argv[1:] else 0


def fill(text: str) -> str:
    """The page with every table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = make()
        text = pattern.sub(lambda match, body=body: match[1] + body + match[2], text)
    return text


def _load(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def machine(file: str = "bench_models.json") -> str:
    """One line on the machine of the latency figures."""
    record = _load(file)
    if record is None:
        return ""
    found = record["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in SHOWN_VERSIONS)
    return (
        f"{found['cpu']} ({found['mcpu']}, {found['instruction_set']}), {found['cores']} cores; {versions}; "
        f"{found['date']}.\n"
    )


SHOWN_VERSIONS = ("apache-tvm", "onnxruntime", "openvino")


SCORED = {
    "int8": "onnxruntime int8",
    "nncf": "NNCF int8",
    "qfp8": "QFP8",
    "qfp8 without samples": "QFP8 without samples",
}


def accuracy() -> str:
    """Task scores."""
    record = _load("accuracy.json") or {}
    rows = []
    for model, found in record.items():
        runners = found["runners"]
        for task, base in runners["float32"]["tasks"].items():
            row = [model, f"{task}, {base['metric']} ({base['items']})", f"{base['score']:.4f}"]
            for runner in SCORED:
                scored = runners.get(runner, {}).get("tasks", {}).get(task)
                change = scored and f"{scored['score']:.4f} ({0 - 100 * scored['relative_loss']:+.2f} %)"
                row.append(change or "-")
            rows.append(row)
        sqnr = [f"{runners[runner]['sqnr_db']:.1f}" if runner in runners else "-" for runner in SCORED]
        rows.append([model, "output SQNR, dB", "", *sqnr])
    return _table(["model", "task (items)", "float32", *SCORED.values()], rows) if rows else ""


def latency(file: str = "bench_models.json") -> str:
    """Milliseconds and ratios."""
    record = _load(file)
    if record is None:
        return ""
    peers = list(dict.fromkeys(p for row in record["models"] for p in row["speedup"]))
    rows = []
    for row in record["models"]:
        cells = [
            f"{row['milliseconds'][p]:.1f} ({row['speedup'][p]:.2f})" if p in row["speedup"] else "-"
            for p in peers
        ]
        ours = f"{row['milliseconds']['qfp8']:.1f}"
        rows.append([row["model"], str(row["threads"]), ours, *cells])
    return _table(["model", "threads", "QFP8", *(SCORED.get(p, p) for p in peers)], rows)


def recurrent() -> str:
    """Milliseconds and ratios of recurrent layers."""
    record = _load("bench_recurrent.json")
    if record is None:
        return ""
    peers = list(record["rows"][0]["times as fast as"])
    rows = []
    for row in record["rows"]:
        cells = [f"{row['milliseconds'][p]:.1f} ({row['times as fast as'][p]:.2f})" for p in peers]
        rows.append([row["network"], f"{row['milliseconds']['QFP8']:.1f}", *cells, f"{row['sqnr_db']:.1f}"])
    return _table(["layers", "QFP8", *peers, "SQNR, dB"], rows)


def files() -> str:
    """Networks of Python packages, from their files as they come."""
    record = _load("bench_files.json")
    if record is None:
        return ""
    peers = list(dict.fromkeys(name for row in record["rows"] for name in row["times as fast as"]))
    quantized = list(dict.fromkeys(name for row in record["rows"] for name in row["sqnr_db"]))
    rows = []
    for row in record["rows"]:
        times, ratios, sqnr = row["milliseconds"], row["times as fast as"], row["sqnr_db"]
        cells = [f"{times[p]:.2f} ({ratios[p]:.2f})" if p in times else "fails" for p in peers]
        decibels = " / ".join(f"{sqnr[name]:.0f}" if name in sqnr else "-" for name in quantized)
        rows.append([row["file"], f"{times['QFP8']:.2f}", *cells, decibels])
    return _table(["file", "QFP8", *peers, f"SQNR, dB: {' / '.join(quantized)}"], rows)


def lengths() -> str:
    """One module for several lengths, on inputs of many."""
    record = _load("bench_lengths.json")
    if record is None:
        return ""
    peers = list(record["rows"][0]["speedup"])
    rows = [
        [
            str(row["tokens"]),
            f"{row['milliseconds']['qfp8']:.1f}",
            *(f"{row['milliseconds'][peer]:.1f} ({row['speedup'][peer]:.2f})" for peer in peers),
        ]
        for row in record["rows"]
    ]
    return _table(["tokens", "QFP8", *peers], rows)


def kernels(file: str = "bench_kernels.json") -> str:
    """How single layers compare, and the bars."""
    record = _load(file)
    if record is None:
        return ""
    rows = [
        [bar["name"], f"{bar['value']:.2f}", bar["asked"], "yes" if bar["met"] else "no"]
        for bar in record["bars"]
    ]
    return _table(["layers, times as fast as", "found", "asked", "met"], rows)


def functions() -> str:
    """Nonlinear layers against the faster of torch and onnxruntime, and training against torch."""
    record, training = _load("bench_functions.json"), _load("bench_training.json")
    if record is None or training is None:
        return ""
    trained = {
        row["function"]: f"{row['speedup']['training']:.1f}"
        for row in training["rows"]
        if row["size"] == LARGE and row["dtype"] == "float32"
    }
    found: dict[str, dict[int, str]] = {}
    for row in record["rows"]:
        speed = row["gigaelements"]
        peers = [speed[peer] for peer in ("torch", "onnxruntime") if peer in speed]
        if peers:
            ratio = f"{speed['native 0.001'] / max(peers):.1f}"
            found.setdefault(row["function"], {})[row["size"]] = ratio
    rows = [
        [name, *(ratios.get(size, "-") for size in (SMALL, LARGE)), trained.get(name, "-")]
        for name, ratios in found.items()
    ]
    header = ["times as fast as", "inference, 2^14 values", "inference, 2^20", "forward and backward, 2^20"]
    return _table(header, rows)


SMALL, LARGE = 1 << 14, 1 << 20


def cycles() -> str:
    """Dense tiles on Arm CPUs by llvm-mca."""
    record = _load("bench_cycles.json")
    if record is None:
        return ""
    rows = [
        [
            tile["cpu"],
            tile["activation"],
            tile["weight"],
            *(f"{tile[k]:.2f}" for k in ("macs_per_cycle", "float32_macs_per_cycle", "ratio")),
        ]
        for tile in record["tiles"]
    ]
    return _table(["CPU's model", "activations", "weights", "QFP8", "float32", "QFP8 / float32"], rows)


def qat() -> str:
    """Accuracies of quantization-aware training: mean and deviation over the seeds."""
    record = _load("qat.json")
    if record is None:
        return ""

    def cell(name: str) -> str:
        found = record["summary"].get(name)
        return f"{100 * found['mean']:.2f} +- {100 * found['deviation']:.2f}" if found else "-"

    rows = [["float32", cell("float32"), cell("float32 trained on")]]
    names = [name.removesuffix(" qat") for name in record["summary"] if name.endswith(" qat")]
    rows += [[name, cell(f"{name} ptq"), cell(f"{name} qat")] for name in names]
    return _table(["format", "as trained in float32", "trained on, with rounding"], rows)


def layouts() -> str:
    """The layouts of the format module."""
    from tvm_qfp8.format import LAYOUTS

    uses = {
        "E1M6": "linear, symmetric int8",
        "E2M5": "weights, activations",
        "E3M4": "activations with outliers",
        "E4M3": "comparisons; the grid of float8_e4m3fnuz",
        "UE1M7": "linear uint8",
        "UE2M6": "activations that are never negative",
        "UE3M5": "the same, with outliers",
    }
    rows = [
        [
            f"**{name}**" if name == "E2M5" else name,
            str(layout.exponent_bits),
            str(layout.mantissa_bits),
            "yes" if layout.signed else "no",
            str(layout.max_grid),
            "0x80" if layout.nan_code is not None else "none",
            uses[name],
        ]
        for name, layout in LAYOUTS.items()
    ]
    return _table(["layout", "e", "m", "sign", "largest G", "NaN", "used for"], rows)


def formats() -> str:
    """Mean output SQNR of each format over the models of the comparison."""
    from formats_page import FORMATS, MODES, mean_over_models, model_groups

    record = _load("formats.json")
    if record is None:
        return ""
    groups, rows = model_groups(record), []
    for one in FORMATS:
        means = [mean_over_models(groups, one.name, mode) for mode in MODES]
        rows.append([f"**{one.name}**" if one.name == "QFP8" else one.name, *(f"{m:.1f}" for m in means)])
    return _table(["format", *MODES], rows)


def cuda() -> str:
    """A GPU's kernels against torch's."""
    record = _load("bench_cuda.json")
    if record is None:
        return ""
    rows = []
    for row in record["rows"]:
        shape = row.get("shape")
        rows.append(
            [
                f"{row['kind']} {' x '.join(map(str, shape))}, {row['activations']} x {row['weights']}"
                if shape
                else row["kind"],
                f"{row['seconds']['ours'] * 1e6:.1f} us",
                *(f"{row[f'times_{name}']:.2f}" if f"times_{name}" in row else "" for name in CUDA_PEERS),
                f"{row['share_of_copy']:.2f}",
            ]
        )
    header = ["kernel", "time", *(f"times {name}" for name in CUDA_PEERS), "share of copy"]
    models = [
        [
            row["model"],
            "yes" if row["equal"] else "no",
            *(f"{row[key] * 1e6:.0f} us" for key in ("seconds", "seconds_with_copies", "torch_seconds")),
            f"{row['times_torch']:.2f}",
        ]
        for row in record["models"]
    ]
    model_header = [
        "model",
        "bits of the CPU",
        "time",
        "with copies",
        "torch float16, a graph",
        "times torch",
    ]
    tables = f"{_table(header, rows)}\n{_table(model_header, models)}"
    return (
        f"{tables}\n{record['gpu']}, torch {record['torch']}, a copy moves "
        f"{record['copy_bytes_per_second'] / 1e12:.2f} TB/s; {record['machine']['date']}.\n"
    )


CUDA_PEERS = ("float16", "int8", "fp8", "torch")


TABLES: dict[str, Callable[[], str]] = {
    "cuda": cuda,
    "machine": machine,
    "accuracy": accuracy,
    "latency": latency,
    "lengths": lengths,
    "recurrent": recurrent,
    "files": files,
    "kernels": kernels,
    "functions": functions,
    "cycles": cycles,
    "qat": qat,
    "layouts": layouts,
    "formats": formats,
    "amx machine": lambda: machine("bench_models_amx.json"),
    "amx latency": lambda: latency("bench_models_amx.json"),
    "amx kernels": lambda: kernels("bench_kernels_amx.json"),
}

if __name__ == "__main__":
    sys.exit(main())
