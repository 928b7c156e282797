"""Which layer a module calls each of its kernels for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
from tvm import relax

from tvm_qfp8.layer_names import layer_name

Calls = Mapping[str, Sequence[Sequence[str]]]
"""For each function of a module its kernel calls in order: the kernel's name and the layer's."""


def kernel_calls(mod: tvm.IRModule) -> Calls:
    """Of a lowered program, whose variables still have the names of layers."""
    return {
        var.name_hint: [
            (str(getattr(binding.value.args[0], "name_hint", "")), layer_name(binding.var))
            for block in function.body.blocks
            for binding in block.bindings
            if isinstance(binding.value, relax.Call) and binding.value.args
        ]
        for var, function in mod.functions_items()
        if isinstance(function, relax.Function)
    }


def layers_of(calls: Calls, kernels: Sequence[str]) -> list[str]:
    """The layers of kernel calls seen in a run, of whichever function it was; empty strings where none fits.

    Some calls of the program are none of the machine's: a reshape moves nothing.
    """
    for function in calls.values():
        rest, layers = iter(function), []
        for kernel in kernels:
            layer = next((layer for name, layer in rest if name == kernel), None)
            if layer is None:
                break
            layers.append(layer)
        else:
            return layers
    return [""] * len(kernels)
