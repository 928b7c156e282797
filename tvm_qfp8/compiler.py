"""``compile``: from a trained float network to a module, as one flat list of passes."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from tvm_qfp8.batchnorm import as_configured
from tvm_qfp8.calibration import (
    Metric,
    Program,
    QuantizationPlan,
    StoredSamples,
    calibrate,
    first_samples,
    keep_within,
    output_sqnr,
    padded_samples,
)
from tvm_qfp8.code_generation import generate_code
from tvm_qfp8.config import Config
from tvm_qfp8.cpu_features import used_features
from tvm_qfp8.cuda_code import register_compiler
from tvm_qfp8.errors import CalibrationError
from tvm_qfp8.importers import Imported, Shapes, load_model
from tvm_qfp8.importers.imported import result_types
from tvm_qfp8.kernel_calls import kernel_calls
from tvm_qfp8.length_programs import (
    SharedPanels,
    check_same_layers,
    function_at,
    joined,
    padding_is_unseen,
)
from tvm_qfp8.lengths import Lengths, Variant
from tvm_qfp8.linker import architecture
from tvm_qfp8.overflow_guard import keep_sums_in_int32
from tvm_qfp8.relay_passes.copy_inputs import CopyInputs
from tvm_qfp8.relay_passes.fold_heads import FoldHeads
from tvm_qfp8.relay_passes.for_cuda import ForCuda
from tvm_qfp8.relay_passes.halve_traffic import HalveTraffic
from tvm_qfp8.relay_passes.interpolate import Interpolate
from tvm_qfp8.relay_passes.lift_above_zero import lift_above_zero
from tvm_qfp8.relay_passes.lower_dtype import LowerDtype
from tvm_qfp8.relay_passes.lower_groups import LowerGroups
from tvm_qfp8.relay_passes.operands import storage_dtype
from tvm_qfp8.relay_passes.prepare import prepare
from tvm_qfp8.relay_passes.quantize_linear import QuantizeLinear
from tvm_qfp8.relay_passes.schedule_rest import ScheduleRest
from tvm_qfp8.relay_passes.share_constants import ShareConstants
from tvm_qfp8.relay_passes.tabulate_codes import TabulateCodes
from tvm_qfp8.relay_passes.trained import take_trained
from tvm_qfp8.reporting import describe
from tvm_qfp8.runtime import (
    AT_LOAD,
    LOAD_FUNCTION,
    LOADED,
    METADATA_FUNCTION,
    CompiledModule,
    encode_metadata,
)
from tvm_qfp8.static_shapes import check_static_shapes
from tvm_qfp8.targets import cpu_features, host_of, parse_target
from tvm_qfp8.targets import isa as isa_name
from tvm_qfp8.tensor_info import TensorInfo
from tvm_qfp8.topi.isa import InstructionSet, instruction_set
from tvm_qfp8.topi.schedules import ScheduleChooser, default_schedule
from tvm_qfp8.topi.static_memory import StaticMemory
from tvm_qfp8.tuning.logs import LoggedSchedules, default_roots

SENSITIVITY_SAMPLES = 4
"""Samples on which the harm of single layers is compared."""

Calibration = Iterable[Mapping[str, np.ndarray]] | str | os.PathLike | None
Canonical = tuple[tvm.IRModule, QuantizationPlan | None]
"""A canonical program, and the plan that quantization-aware training left in it."""


def lowering_passes(
    plan,
    config: Config,
    isa: InstructionSet,
    threads: int,
    choose: ScheduleChooser = default_schedule,
    memory: StaticMemory | None = None,
    halved: dict[str, str] | None = None,
) -> list:
    """The passes from the canonical float program to scheduled kernels, in order.

    ``halved`` gets the layers whose results are rounded to float16 or bfloat16, and to which; none are if it is None.
    """
    return [
        # -- quantize: linear layers on QFP8 tensors, with the calibration's layouts, scales and biases
        QuantizeLinear(plan),
        # -- functions of what is held as codes only become tables of 256 results
        TabulateCodes(),
        # -- interpolate: nonlinear layers become tables
        Interpolate(config.max_error),
        # -- what goes from kernel to kernel in float32, such as residual sums, is rounded to two bytes
        *([] if halved is None else [HalveTraffic(halved)]),
        # -- products of two activations read and write heads where they lie
        FoldHeads(),
        # -- fuse and schedule: one kernel per group of layers, from codes to codes
        LowerGroups(isa, threads, config.max_error, choose, memory),
        # -- the rest: remaining QFP8 tensors become bytes, remaining operators get a generic schedule
        LowerDtype(),
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
        *([CopyInputs(), ForCuda()] if isa.name == "cuda" else [ScheduleRest(isa, threads)]),
    ]


def compile(  # noqa: A001 - the public name
    mod: Any,
    target: Any = "llvm",
    *,
    params: Mapping[str, np.ndarray | float] | None = None,
    input_shapes: Shapes | None = None,
    calibration: Calibration = None,
    config: Config | None = None,
    tuning_logs: str | os.PathLike | ScheduleChooser | None = None,
    max_drop: float | None = None,
    metric: Metric | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompiledModule:
    """Compile a trained float network.

    Parameters
    ----------
    mod : Relax IRModule, onnx.ModelProto, path to an .onnx file, or torch.export.ExportedProgram
    target : str, dict or tvm.target.Target
        ``"llvm"`` is this machine; see ``tvm-qfp8 targets``.
    params : dict of name to array
        Inputs that become constants: parameters of a Relax module that are not bound yet, switches and masks that are
        always the same. For an ONNX model's a number stands for every element.
    input_shapes : dict of name to shape
        Needed where the model leaves dimensions open. A name instead of the first extent of every input leaves the
        batch open: ``run`` then takes any number of samples, one after the other. A list instead of an extent, such as
        ``{"input_ids": (1, lengths_up_to(128))}`` or ``(1, [16, 32, 64])``, makes a module for all these lengths, with
        one set of weights. Inputs between them are padded with zeros up to the next where outputs do not see it, as
        with an attention mask; else ``run`` takes these lengths only.
    calibration : iterable of ``{input name: array}``, path of an .npz, or None
        Samples with the inputs' full shapes, of several lengths the longest; shorter ones are padded where ``run``
        pads. None: weights are quantized, and what dense layers, most convolutions and attention read with a scale
        for each row or sample, found at run time; depthwise convolutions keep float32 activations. All that is slower.
    config : Config
    tuning_logs : path or ScheduleChooser
        A folder of tuning logs to take schedules from, or a function that chooses them; None: the logs of this
        package and of ``tvm-qfp8 tune`` on this machine. Layers without a record for exactly this target get the
        default schedule.
    max_drop : float
        In percent of float32's score by ``metric``: where the module loses more it gets wider layouts, then the fewest
        layers that keep the score are left in float32, the most harmful first; the report says so.
    metric : callable ``(run) -> float``
        Scores a network given as ``run({input name: array}) -> outputs``, higher for better: for ``max_drop``, and
        to accept what ``Config(recalibrate_batchnorm=True)`` finds.
    progress : callable ``(stage, done, total)``
        Called as the work goes on.

    Raises
    ------
    QFP8Error
        A subclass says what is wrong with model, target or data.
    """
    config = config or Config()
    parsed = parse_target(target)
    host = host_of(parsed)
    on_gpu = isa_name(parsed) == "cuda"
    isa = instruction_set(isa_name(parsed), {str(parsed.attrs["arch"])} if on_gpu else cpu_features(host))
    stage = progress or (lambda name, done, total: None)
    stage("import", 0, 1)
    imported = load_model(mod, params=params, input_shapes=input_shapes)
    canonical, trained = _canonical(imported, config)
    axes = {} if imported.length is None else imported.length.axes
    shorter: dict[int, Canonical] = {}
    if imported.length is not None:
        *lengths, _ = imported.length.lengths
        for done, length in enumerate(lengths, 1):
            stage("import", done, len(lengths) + 1)
            shapes = imported.length.shapes_at(input_shapes or {}, length)
            shorter[length] = _canonical(load_model(mod, params=params, input_shapes=shapes), config)
    padding = bool(shorter) and padding_is_unseen(shorter[min(shorter)][0], canonical, axes)
    if padding and calibration is not None:
        calibration = padded_samples(calibration, Program(canonical).inputs, axes)
    stage("import", 1, 1)
    if shorter and config.recalibrate_batchnorm:
        raise CalibrationError(
            "recalibrate_batchnorm works on one length: call tvm_qfp8.recalibrate_batchnorm with the longest before"
        )
    if max_drop is not None and metric is None:
        raise CalibrationError("max_drop and metric belong together: give both or neither")
    if metric is not None and max_drop is None and not config.recalibrate_batchnorm:
        raise CalibrationError(
            "metric and max_drop (or recalibrate_batchnorm) belong together: give both or neither"
        )
    if trained is not None and calibration is not None:
        raise CalibrationError(
            "the model was trained with its own layouts and scales; give no calibration data"
        )
    with ExitStack() as stack:
        configured = as_configured(imported, canonical, calibration, config, metric, progress)
        canonical, batches = stack.enter_context(configured)
        if max_drop is not None and calibration is not None:
            batches = stack.enter_context(StoredSamples(batches or (), Program(canonical).inputs))
        samples, first = first_samples(batches, Program(canonical).inputs, SENSITIVITY_SAMPLES)
        if calibration is not None:
            canonical = lift_above_zero(canonical)
            shorter = {length: (lift_above_zero(program), own) for length, (program, own) in shorter.items()}
        plan = calibrate(canonical, samples, config, progress) if trained is None else trained
        if metric is not None and max_drop is not None:

            def wider() -> QuantizationPlan:
                imported.notes.append("max_drop: linear layouts only where they cost nothing")
                return calibrate(canonical, batches, replace(config, byte_loss_db=0.0), progress)

            again = wider if trained is None and config.byte_loss_db != 0 else None
            plan = keep_within(canonical, plan, first, metric, max_drop, config.max_error, progress, again)
    keep_sums_in_int32(plan)
    for length, (program, own) in shorter.items():
        check_same_layers(program, length, canonical, plan)
        if own is not None:
            keep_sums_in_int32(own)
    threads = config.threads or int(parsed.attrs.get("num-cores", 0)) or 1
    report = describe(canonical, plan, config, parsed, imported.notes)
    if first:
        found = output_sqnr(canonical, plan, first, config.max_error)
        shown = [
            f"{name} {db:.1f}"
            for name, db in zip(imported.output_names, found, strict=True)
            if db is not None
        ]
        report.totals["signal to error of outputs, dB"] = f"{', '.join(shown)} ({len(first)} of the samples)"
    inputs, outputs = _tensor_infos(canonical, imported)
    several = None
    if imported.length is not None:
        variants = [
            Variant(length, function_at(length), *_tensor_infos(program, imported))
            for length, (program, _) in shorter.items()
        ]
        variants.append(Variant(imported.length.lengths[-1], "main", inputs, outputs))
        several = Lengths(axes, padding, variants)
        report.notes.append(several.describe())
    versions = {name: importlib.metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi", "numpy")}
    stage("build kernels", 0, 2)
    if callable(tuning_logs) or on_gpu:
        choose = tuning_logs if callable(tuning_logs) else default_schedule
    else:
        choose = LoggedSchedules(parsed, default_roots() if tuning_logs is None else [Path(tuning_logs)])
    with parsed:
        memory = StaticMemory() if config.winograd and not on_gpu else None
        shared = SharedPanels(choose) if shorter else choose
        # A network that was trained with its rounding gives what it gave there, to the bit.
        halved: dict[str, str] | None = {} if trained is None else None

        def lower(program: tvm.IRModule, own: QuantizationPlan) -> tvm.IRModule:
            passes = lowering_passes(own, config, isa, threads, shared, memory, halved)
            return tvm.transform.Sequential(passes)(program)

        # Long ones first: their tiles suit the most work. What is joined stands in the longest, the last.
        descending = sorted(shorter.items(), reverse=True)
        others = {length: lower(program, own or plan) for length, (program, own) in descending}
        lowered = tvm.transform.Sequential([ShareConstants()])(joined(lower(canonical, plan), others))
        if isinstance(choose, LoggedSchedules):
            report.totals["tuned kernels"] = f"{len(choose.used)} of {len(choose.asked)}"
        if plan.codes:
            report.totals["sums kept as codes"] = ", ".join(plan.codes)
        rounded = halved or {}
        for dtype in sorted(set(rounded.values())):
            names = [name for name in rounded if rounded[name] == dtype]
            report.totals[f"results rounded to {dtype}"] = ", ".join(names)
        report.totals["resident bytes of constants after load"] = _constant_bytes(lowered)
        if memory is not None and memory.fillers:
            report.totals[LOADED] = f"{memory.size} ({len(memory.fillers)} layers, {AT_LOAD})"
            lowered = _add_load(lowered, memory)
        # Only codes have no NaN: a network without quantized layers takes what float32 takes.
        quantized = any(layer.weight_layout or layer.activation_layout for layer in report.layers)
        cpu = {"architecture": architecture(parsed), "features": used_features(host)}
        check_finite = config.check_finite and quantized
        device = str(parsed.kind.name).replace("llvm", "cpu")
        calls = kernel_calls(lowered)
        metadata = encode_metadata(
            inputs, outputs, report, versions, check_finite, cpu, device, imported.batch, several, calls
        )
        lowered = _add_metadata(lowered, metadata)
        stage("build kernels", 1, 2)
        if on_gpu:
            register_compiler(parsed)
        executable = generate_code(lowered, parsed)
    stage("build kernels", 2, 2)
    return CompiledModule(metadata, executable, executable, parsed)


def _canonical(imported: Imported, config: Config) -> Canonical:
    try:
        canonical, trained = take_trained(prepare(imported.mod), config.skip)
    except Exception:  # passes raise whatever they do on tensors of unknown shape, the cause worth naming
        check_static_shapes(imported.mod)
        raise
    check_static_shapes(canonical)
    return canonical, trained


def _tensor_infos(canonical: tvm.IRModule, imported: Imported) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of a program."""
    results = result_types(canonical)
    parameters = [parameter.ty for parameter in canonical["main"].params]
    inputs, outputs = (
        [
            TensorInfo(name, tuple(int(d) for d in ty.shape), storage_dtype(str(ty.dtype)))
            for name, ty in zip(names, types, strict=True)
        ]
        for names, types in ((imported.input_names, parameters), (imported.output_names, results))
    )
    return inputs, outputs


def _constant_bytes(mod: tvm.IRModule) -> int:
    """Bytes of all constants: packed codes, scales, biases. They stay as they are in memory."""
    sizes: dict[GenericConst, int] = {}

    def visit(expr) -> None:
        if isinstance(expr, GenericConst):
            shape = [int(extent) for extent in expr.value.shape]
            sizes[expr] = math.prod(shape) * tvm.DataType(str(expr.ty.dtype)).itemsize

    for _, function in mod.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return sum(sizes.values())


def _add_load(mod: tvm.IRModule, memory: StaticMemory) -> tvm.IRModule:
    """A function without parameters that fills the module's memory; kernels find it filled."""
    builder = relax.BlockBuilder(mod)
    functions: dict[str, relax.GlobalVar] = {}
    with builder.function(LOAD_FUNCTION, []):
        for filler in memory.fillers:
            if filler.key not in functions:
                function = filler.function().without_attr("global_symbol")
                functions[filler.key] = builder.add_func(function, "transform_filters")
            constants = [relax.const(array, str(array.dtype)) for array in filler.arguments]
            done = relax.TensorType((1,), "int32")
            result = builder.emit(relax.call_tir(functions[filler.key], constants, done))
        builder.emit_func_output(result)
    return builder.get()


def _add_metadata(mod: tvm.IRModule, metadata: np.ndarray) -> tvm.IRModule:
    """A function without parameters that returns the metadata's bytes."""
    builder = relax.BlockBuilder(mod)
    with builder.function(METADATA_FUNCTION, []):
        builder.emit_func_output(builder.emit(relax.const(metadata)))
    return builder.get()
