"""Prepares a model for quantization-aware training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tvm_qfp8.calibration.activations import LAYOUTS, Observer
from tvm_qfp8.errors import CalibrationError, InputError
from tvm_qfp8.format import get_layout
from tvm_qfp8.quantize import quantize
from tvm_qfp8.torch.batchnorm import call_model
from tvm_qfp8.torch.qat_layers import LAYERS, reason_to_skip, to_qat
from tvm_qfp8.torch.replace import leave_fast_path, replace_activations

LARGEST_EXPONENT_BITS = 3


@dataclass(frozen=True)
class QATConfig:
    """How a model is quantized while it is trained.

    Attributes
    ----------
    weights : str
        Layout of all weights.
    activations : str
        ``auto``: the layout of least error for each layer's input; or one layout's name for all.
    per_channel : bool
        A weight scale for each output channel; else one for the whole weight. Embeddings have one for each row.
    bias : {"tracked", "learned"}
        Scales follow the tensors towards least squared error, or are parameters with a gradient (LSQ).
    skip : tuple of str
        Names or shell patterns (``fnmatch``) of layers to leave in float32.
    max_error : float or None
        Bound of the interpolated activation layers, to be the same as ``Config.max_error`` when the model is
        compiled; None keeps torch's own layers.
    """

    weights: str = "E2M5"
    activations: str = "auto"
    per_channel: bool = True
    bias: str = "tracked"
    skip: tuple[str, ...] = ()
    max_error: float | None = 1e-3


def prepare_qat(
    module: nn.Module, config: QATConfig | None = None, *, batches: Iterable[Any] | None = None
) -> dict[str, str]:
    """Make every linear layer and embedding of a model round its weight and its input, in place.

    Train on as usual, best from trained weights and at a small learning rate. Then ``torch.export.export(model.eval(),
    inputs)`` and ``tvm_qfp8.compile``: the compiled layers have the codes and scales that were trained. The parameters
    stay the same objects, so an optimizer of the model goes on; with learned biases make it afterwards.

    A BatchNorm that alone reads a convolution or Linear becomes its ``norm`` and is folded at compile time; this needs
    a model that ``torch.fx`` traces. Other BatchNorms stay where they are.

    Parameters
    ----------
    module
        In float32, weights finite.
    config
        Defaults are right for most models.
    batches
        Inputs to choose layouts and first scales of activations on: tensors, tuples of positional arguments or dicts
        of named ones, some hundred samples in all. Without them only weights are rounded.

    Returns
    -------
    dict of str to str
        Each layer's name and what became of it, or why it stays float32.

    Raises
    ------
    InputError
        An unknown layout or bias, a weight that is not finite, an activation layer without a table.
    CalibrationError
        There was no batch.
    """
    config = config or QATConfig()
    _check(config)
    named = {name: layer for name, layer in module.named_modules() if type(layer) in LAYERS}
    norms = _norms_behind(module, named)
    found: dict[str, str] = {}
    prepared: dict[str, nn.Module] = {}
    for name, layer in named.items():
        pattern = next((p for p in config.skip if fnmatchcase(name, p)), None)
        reason = f"skipped by configuration ({pattern})" if pattern else reason_to_skip(layer)
        if reason is not None:
            found[name] = f"float32: {reason}"
        elif not bool(torch.isfinite(layer.weight).all()):
            raise InputError(f"the weight of {name} holds NaN or infinity; give a model with finite weights")
        else:
            prepared[name] = layer
    # This may be impossible, and then nothing is changed yet.
    if config.max_error is not None:
        swapped = replace_activations(module, config.max_error)
        found |= {name: f"interpolated {kind}" for name, kind in swapped.items()}
    for name, layer in prepared.items():
        to_qat(layer, config.weights, config.per_channel, config.bias == "learned", quantize)
        norm_name = norms.get(name)
        if norm_name is not None:
            layer.norm = module.get_submodule(norm_name)
            module.set_submodule(norm_name, nn.Identity())
    for part in module.modules():
        leave_fast_path(part)
    if batches is not None:
        _choose_activations(module, prepared, config, batches)
    for name, layer in prepared.items():
        source = getattr(layer, "input_quantizer", None)
        found[name] = (
            config.weights if source is None else f"{config.weights}, input {source.layout or 'float32'}"
        )
    return found


def _check(config: QATConfig) -> None:
    names = [config.weights] + ([] if config.activations == "auto" else [config.activations])
    for name in names:
        if get_layout(name).exponent_bits > LARGEST_EXPONENT_BITS:
            warnings.warn(f"{name} can be trained and compared, but not compiled", stacklevel=3)
    if not get_layout(config.weights).signed:
        raise InputError(f"weights={config.weights!r} has no sign; use a signed layout such as E2M5")
    if config.bias not in ("tracked", "learned"):
        raise InputError(f"bias is {config.bias!r}; 'tracked' and 'learned' are known")


def _norms_behind(module: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """By a layer's name the name of the BatchNorm that alone reads its result, each called once."""
    norms = [name for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)]
    if not norms:
        return {}
    try:
        graph = torch.fx.Tracer().trace(module)
    except Exception:  # what the model's own Python code does under a tracer
        return {}
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    pairs = {}
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in norms:
            continue
        norm = module.get_submodule(node.target)
        (source,) = node.args[:1] or (None,)
        if (
            not isinstance(source, torch.fx.Node)
            or source.op != "call_module"
            or not norm.track_running_stats
        ):
            continue
        once = calls[str(source.target)] == calls[str(node.target)] == 1 and len(source.users) == 1
        if once and _can_fold(layers.get(str(source.target))):
            pairs[str(source.target)] = str(node.target)
    return pairs


def _can_fold(layer: nn.Module | None) -> bool:
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.groups == 1  # groups share their scales
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)


def _choose_activations(
    module: nn.Module, layers: dict[str, nn.Module], config: QATConfig, batches: Iterable[Any]
) -> None:
    """Layout and scale of least error of every layer's input, the weights rounded."""
    observers = {name: Observer() for name, layer in layers.items() if hasattr(layer, "input_quantizer")}

    def observe(name: str) -> Any:
        def record(_layer: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            observers[name].record(arguments[0].detach().float().cpu().numpy())

        return record

    hooks = [layers[name].register_forward_pre_hook(observe(name)) for name in observers]
    training = {part: part.training for part in module.modules()}
    module.eval()
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                call_model(module, batch)
                seen += 1
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in training.items():
            part.training = mode
    if not seen:
        raise CalibrationError("prepare_qat got no batches; give some, or None to round weights only")
    layouts = LAYOUTS if config.activations == "auto" else (config.activations,)
    for name, observer in observers.items():
        found = observer.choose(layouts).activation
        if found is not None:
            layers[name].input_quantizer.start(found.layout, found.scale)
