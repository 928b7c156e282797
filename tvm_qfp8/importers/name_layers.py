"""Gives the variables of an imported program the names of the file's layers.

An importer turns a node into one operator or several, and leaves most of them for the block builder to name. Of these
the linear one is the layer, as in ``add(matmul(x, weight), bias)``, else the last. One that runs twice is ``fc`` and
``fc:2``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import onnx
import tvm
from tvm import relax

from tvm_qfp8.layer_names import variable_name
from tvm_qfp8.relay_passes.fuse import op_name
from tvm_qfp8.relay_passes.rewriter import MainRewriter


class LayerNames:
    """Collects, while an importer runs, what each variable is to be called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._seen: set[str] = set()
        self._last: tuple[str, list[str]] = ("", [])
        """The last layer, and what of it bears its name but is not linear."""

    def note(self, builder: relax.BlockBuilder, results: Sequence[relax.Expr], layer: str) -> None:
        """``results`` are what a node of ``layer`` became; they and what is new behind them were emitted for it."""
        new = [*self._new(builder, results)]
        if not new:
            return
        linear = [name for name, value in new if is_linear(value)]
        named = linear or [new[0][0]]
        if layer == self._last[0]:
            # One of its nodes bears the name: the linear ones, else the last.
            if not self._last[1] and not linear:
                return
            for name in self._last[1]:
                del self.names[name]
        if linear and new[0][0] not in linear:
            self.names[new[0][0]] = f"{layer}_out"
        self.names |= dict.fromkeys(named, layer)
        self._last = layer, [] if linear else named

    def _new(
        self, builder: relax.BlockBuilder, results: Sequence[relax.Expr]
    ) -> Iterator[tuple[str, relax.Expr]]:
        """Variables not seen before with what they are bound to, from the results back."""
        for result in results:
            if isinstance(result, relax.Var) and result.name not in self._seen:
                self._seen.add(result.name)
                value = builder.lookup_binding(result)
                if value is not None:
                    yield result.name, value
                    yield from self._new(builder, relax.analysis.free_vars(value))

    def given_to(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The program with its variables renamed; as it is where shapes depend on values, which is refused later."""
        bindings = [binding for block in mod["main"].body.blocks for binding in block.bindings]
        static = all(isinstance(binding, relax.VarBinding) for binding in bindings)
        return _Rewriter(mod, self.names).rewrite() if static else mod


def is_linear(value: relax.Expr) -> bool:
    """Whether this is what quantization calls a layer."""
    name = op_name(value)
    return name in ("relax.matmul", "relax.qfp8.recurrent") or name.startswith("relax.nn.conv")


def layer_of_module(path: str, kind: str, node: str) -> str:
    """The name of a node of torch inside the module ``path`` of class ``kind``: what torch.nn has is one layer."""
    if path and kind.startswith("torch.nn.modules."):
        return path
    return f"{path}.{node}" if path else node


def node_names(model: onnx.ModelProto) -> dict[str, str]:
    """For every result of a node what its layer is called: the node, or the module that torch's exporter notes.

    The exporter of torch.export programs calls nodes ``node_linear_3`` and writes modules into their metadata, as
    ``: Net/encoder.0: torch.nn.modules.linear.Linear/linear: aten.linear.default``.
    """
    names: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Identity":
            names[node.output[0]] = names.get(node.input[0], node.name or node.output[0])
            continue
        namespace = next((prop.value for prop in node.metadata_props if prop.key == "namespace"), "")
        scopes = [scope.partition(": ")[::2] for scope in namespace.split("/")]
        layer = node.name
        if len(scopes) > 1:
            (path, kind), (call, _) = scopes[-2:]
            layer = layer_of_module(path, kind, call)
        names |= {output: layer or output for output in node.output}
    return names


class _Rewriter(MainRewriter):
    def __init__(self, mod: tvm.IRModule, names: dict[str, str]) -> None:
        super().__init__(mod)
        self.names = names
        self.calls: Counter[str] = Counter()

    def keep(self, var: relax.Var, value: relax.Expr) -> None:
        layer = self.names.get(var.name)
        if layer is None:
            super().keep(var, value)
            return
        self.calls[layer] += 1
        # The builder would append the number alone, which may be the name of another layer.
        name = layer if self.calls[layer] == 1 else f"{layer}:{self.calls[layer]}"
        self.variables[var] = self.builder.emit(self.expression(value), variable_name(name))
