"""Swaps the activation layers of a whole model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as exact

from tvm_qfp8.torch import functional
from tvm_qfp8.torch.modules import LAYERS

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
    InputError
        A softplus whose threshold no table keeps to.
    """
    swapped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        kind = LAYERS.get(type(module))
        if kind is not None:
            module.__class__ = kind
            module.max_error = max_error
            swapped[name] = kind.__name__
        for attribute, value in list(vars(module).items()):
            function = _function_for(value)
            if function is not None:
                setattr(module, attribute, functools.partial(function, max_error=max_error))
                swapped[f"{name}.{attribute}" if name else attribute] = function.__name__
                _leave_fast_path(module)
    return swapped


def _function_for(value: Any) -> Any:
    try:
        return _FUNCTIONS.get(value) if callable(value) else None
    except TypeError:  # not hashable
        return None


def _leave_fast_path(module: nn.Module) -> None:
    """Torch's fused transformer layer, taken in eval mode, computes the exact function by this mark."""
    if hasattr(module, "activation_relu_or_gelu"):
        module.activation_relu_or_gelu = 0
