"""Swaps the activation layers of a whole model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as exact

from tvm_qfp8.torch import functional
from tvm_qfp8.torch.modules import LAYERS

MOST_AXES = 8
"""A softmax over any axis up to this one can be tried."""
_FUNCTIONS = {
    getattr(namespace, name): getattr(functional, name)
    for namespace in (exact, torch)
    for name in ("gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "elu", "selu", "celu", "softmax")
    if hasattr(namespace, name)
}


def replace_activations(model: nn.Module, max_error: float = functional.MAX_ERROR) -> dict[str, str]:
    """Swap, in place, every activation layer of ``model`` for the interpolated one of the same arguments.

    Layers of exactly the types of ``torch.nn`` that this package has are swapped, and attributes of modules that
    hold a function of ``torch.nn.functional`` or ``torch``, as in ``torch.nn.TransformerEncoderLayer``. Calls of such
    functions inside a ``forward`` are not seen. Weights, hooks and the train or eval mode stay.

    Returns
    -------
    dict of str to str
        What was swapped: the layer's name in the model, and its type or function.

    Raises
    ------
    InputError, TableError
        A layer's argument or ``max_error`` that no table can have; nothing is swapped then.
    """
    layers: dict[str, nn.Module] = {}
    attributes: dict[str, tuple[nn.Module, str, Any]] = {}
    for name, module in model.named_modules():
        kind = LAYERS.get(type(module))
        if kind is not None:
            _try(functools.partial(kind.forward, _swapped(copy.copy(module), kind, max_error)))
            layers[name] = module
        for attribute, value in vars(module).items():
            function = _function_for(value)
            if function is not None:
                interpolated = functools.partial(function, max_error=max_error)
                _try(interpolated)
                attributes[f"{name}.{attribute}".lstrip(".")] = module, attribute, interpolated
    for module in layers.values():
        _swapped(module, LAYERS[type(module)], max_error)
    for module, attribute, function in attributes.values():
        setattr(module, attribute, function)
        leave_fast_path(module)
    named = {name: type(module).__name__ for name, module in layers.items()}
    return named | {name: function.func.__name__ for name, (_, _, function) in attributes.items()}


def _swapped(module: nn.Module, kind: type[nn.Module], max_error: float) -> nn.Module:
    module.__class__ = kind
    module.max_error = max_error
    return module


def _try(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Both directions once, which builds the tables, compiles the kernels and shows what is impossible."""
    with torch.enable_grad():
        function(torch.zeros([1] * MOST_AXES, requires_grad=True)).sum().backward()


def _function_for(value: Any) -> Any:
    try:
        return _FUNCTIONS.get(value) if callable(value) else None
    except TypeError:  # not hashable
        return None


def leave_fast_path(module: nn.Module) -> None:
    """Keep torch's transformer layer from its fused form in eval mode, which does not call the layers inside."""
    if hasattr(module, "activation_relu_or_gelu"):
        module.activation_relu_or_gelu = 0
