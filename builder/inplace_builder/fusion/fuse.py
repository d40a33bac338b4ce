"""Fuse neighbours for the ``plugin`` mechanism: fewer kernels a step, each nearer to the weights' bandwidth.

A decode step of a small model is bound by the number of its kernels, not by what they compute. A transformer layer in PyTorch is some
thirty of them; after this pass it is five: norm + merged QKV projection, RoPE + append + attention, output projection + residual,
norm + gate and up projection + activation, down projection + residual.

Every rewrite is local and keeps what is computed; only roundings between the fused operators go.

Take sampling out of a graph, for mechanisms whose engines have no kernel for it: what is left says the most likely token.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from inplace.schema.served import Program
from inplace.schema.specs import SAMPLING_ROLES, TensorSpec
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument
from torch.fx import Node

from inplace_builder.fusion.attention import AttentionRewriter
from inplace_builder.fusion.patterns import (
    activation,
    does_nothing,
    normalized,
    same_shape,
    written_gelu,
)
from inplace_builder.graph.nodes import (
    CASTS,
    AnyNode,
    copy_graph,
    is_call,
    only_user,
    operand_orders,
    without_casts,
)

aten, inplace = torch.ops.aten, torch.ops.inplace


def fuse(exported: ExportedProgram) -> "Fused":
    """A copy of the program with neighbours fused into ``inplace::linear``, ``rms_norm``, ``qkv_attention`` and ``argmax``.

    Weights made here (merged or transposed) are ``get_attr`` nodes of the graph.
    """
    graph = copy_graph(exported.graph)
    module = torch.fx.GraphModule(exported.graph_module, graph)
    _Fusion(exported, module).run()
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.is_impure())
    graph.lint()
    module.recompile()
    return Fused(
        graph, module, _signature(exported, graph), exported.state_dict, exported.constants
    )


@dataclass(frozen=True)
class Fused:
    """What lowering needs of a program. No ``ExportedProgram``: those may not hold ``get_attr`` nodes.

    Attributes:
        graph: its placeholders are those of the program it was made from.
        graph_module: owns the weights made here.
        graph_signature: which placeholder is what, with the names that the outputs have now.
        state_dict, constants: the program's weights.
    """

    graph: torch.fx.Graph
    graph_module: torch.fx.GraphModule
    graph_signature: ExportGraphSignature
    state_dict: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]

    def bindable(self) -> frozenset[str]:
        """Names of the weights that the runtime should bind rather than the plan hold: matrices of linear layers and embeddings."""
        found = set()
        for node in self.graph.nodes:
            weight = (
                node.args[1]
                if is_call(node, inplace.linear.default)
                else node.args[0]
                if is_call(node, aten.embedding.default)
                else None
            )
            if isinstance(weight, Node):
                found.add(weight.name)
        return frozenset(found)


def _signature(exported: ExportedProgram, graph: torch.fx.Graph) -> ExportGraphSignature:
    signature: ExportGraphSignature = copy.deepcopy(exported.graph_signature)
    (output,) = graph.find_nodes(op="output")
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):
        spec.arg = TensorArgument(name=node.name)
    return signature


class _Fusion(AttentionRewriter):
    def run(self) -> None:
        for rewrite in (
            self._tidy,
            self._norm,
            self._linear,
            self._transposed_linear,
            self._gate,
            self.attention,
            self._normed,
            self._after,
            self._head,
            self._argmax,
        ):
            for node in list(self.graph.nodes):
                if node.op == "call_function" and (node.users or rewrite == self.attention):
                    rewrite(node)
            self.graph.eliminate_dead_code(
                lambda node: node.op in ("placeholder", "output") or node.is_impure()
            )

    # Rewrites

    def _tidy(self, node: AnyNode) -> None:
        """Operators that do nothing go; GELU that is written out becomes one operator."""
        if does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)  # dropout counts as random, so nothing else would
            return
        x = written_gelu(node)
        if x is not None:
            self.replace(node, self.insert(node, aten.gelu.default, (x,), {"approximate": "tanh"}))

    def _norm(self, node: AnyNode) -> None:
        """``weight * (x * rsqrt(mean(x²) + eps))`` with or without casts, also with ``1 + weight``."""
        if (
            node.target is aten.rms_norm.default
            and len(node.args) > 2
            and node.args[2] in self.weights
        ):
            x, _, weight = node.args[:3]
            eps = (
                node.args[3]
                if len(node.args) > 3 and node.args[3] is not None
                else torch.finfo(x.meta["val"].dtype).eps
            )
            self.replace(node, self.insert(node, inplace.rms_norm.default, (x, weight, eps), {}))
            return
        for scale, product in operand_orders(node, aten.mul.Tensor):
            weight, offset = self._norm_weight(scale)
            found = normalized(without_casts(product))
            if weight is None or found is None:
                continue
            x, eps = found
            if (
                len(self.weights[weight].shape) != 1
                or self.weights[weight].shape[0] != x.meta["val"].shape[-1]
            ):
                continue
            last = node
            if last.meta["val"].dtype != x.meta["val"].dtype:
                after = only_user(last)
                if (
                    after is None
                    or not is_call(after, *CASTS)
                    or after.meta["val"].dtype != x.meta["val"].dtype
                ):
                    continue
                last = after
            if offset:
                tensor = self.weights[weight]
                weight = self.weight(
                    ("offset", weight, offset), last, partial(torch.add, tensor.float(), offset)
                )
            self.replace(last, self.insert(last, inplace.rms_norm.default, (x, weight, eps), {}))
            return

    def _norm_weight(self, node: AnyNode) -> tuple[AnyNode, float]:
        """The parameter behind a scale, and what is added to it (Gemma's norms scale with 1 + weight)."""
        found = without_casts(node)
        if found in self.weights:
            return found, 0.0
        if isinstance(found, Node) and found.target is aten.add.Tensor:
            for one, other in (found.args[:2], found.args[1::-1]):
                inner = without_casts(one)
                if inner in self.weights and isinstance(other, int | float):
                    return inner, float(other)
        return None, 0.0

    def _linear(self, node: AnyNode) -> None:
        if not is_call(node, aten.linear.default) or node.args[1] not in self.weights:
            return
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        if bias is not None and bias not in self.weights:
            return
        new = self.insert(
            node, inplace.linear.default, (x, weight, bias), {}, node.meta["val"].shape[-1]
        )
        self.replace(node, new)

    def _transposed_linear(self, node: AnyNode) -> None:
        """``addmm(bias, x, weight)``: GPT-2's Conv1D holds its weights transposed."""
        if not is_call(node, aten.addmm.default) or len(node.args) != 3 or node.kwargs:
            return
        bias, x, weight = node.args
        if bias not in self.weights or weight not in self.weights or self.weights[bias].dim() != 1:
            return
        tensor = self.weights[weight]
        turned = self.weight(("transposed", weight), node, tensor.t)
        flat = (
            is_call(x, aten.view.default, aten.reshape.default)
            and x.args[0].meta["val"].shape[-1] == tensor.shape[0]
        )
        new = self.insert(
            node,
            inplace.linear.default,
            (x.args[0] if flat else x, turned, bias),
            {},
            tensor.shape[1],
        )
        for user in list(node.users) if flat else ():  # the tokens were flattened for addmm only
            if is_call(user, aten.view.default, aten.reshape.default) and same_shape(
                user.meta["val"], new.meta["val"]
            ):
                self.replace(user, new)
        if flat and any(user is not new for user in node.users):
            with self.graph.inserting_before(node):
                again = self.graph.call_function(aten.view.default, (new, [-1, tensor.shape[1]]))
            again.meta.update(node.meta)
            new = again
        self.replace(node, new)

    def _gate(self, node: AnyNode) -> None:
        """``activation(linear(x, gate)) * linear(x, up)`` becomes one gated layer."""
        for activated, up in operand_orders(node, aten.mul.Tensor):
            kind = activation(activated)
            if kind is None or only_user(activated) is not node:
                continue
            gate = activated.args[0]
            if not (self.plain(gate) and self.plain(up) and gate.args[0] is up.args[0]):
                continue
            if (
                only_user(gate) is not activated
                or only_user(up) is not node
                or (gate.args[2] is None) != (up.args[2] is None)
            ):
                continue
            weight, bias = self.merged([gate, up], node)
            width = node.meta["val"].shape[-1]
            new = self.insert(
                node,
                inplace.linear.default,
                (gate.args[0], weight, bias),
                {"activation": kind, "gated": True},
                width,
            )
            self.replace(node, new)
            return

    def _normed(self, node: AnyNode) -> None:
        """A norm in front of linear layers only goes into them."""
        if not is_call(node, inplace.rms_norm.default):
            return
        users = list(node.users)
        through = [
            user for user in users if is_call(user, inplace.linear.default) and user.args[0] is node
        ]
        if (
            len(through) != len(users)
            or len(users) > 1
            or any(len(user.args) > 3 and user.args[3] is not None for user in users)
        ):
            picked = self._picked(node)
            if picked is None:
                return
            users = [picked]
        x, weight, eps = node.args
        for user in users:
            source = x if user.args[0] is node else self._repicked(user, x)
            user.args = (source, *user.args[1:3], weight)
            user.kwargs = {**user.kwargs, "eps": eps}

    def _picked(self, node: AnyNode) -> AnyNode:
        """The head of a language model: norm, pick of each row's last token, linear. The pick can come first."""
        index = only_user(node)
        if index is None or not is_call(index, aten.index.Tensor):
            return None
        indices = index.args[1]
        if any(i is None for i in indices[-1:]) or len(indices) >= node.meta["val"].dim():
            return None
        head = only_user(index)
        return (
            head
            if head is not None and is_call(head, inplace.linear.default) and head.args[0] is index
            else None
        )

    def _repicked(self, head: AnyNode, x: AnyNode) -> AnyNode:
        index = head.args[0]
        with self.graph.inserting_before(index):
            moved = self.graph.call_function(aten.index.Tensor, (x, index.args[1]))
        moved.meta.update(index.meta)
        return moved

    def _after(self, node: AnyNode) -> None:
        """A residual added to a linear layer, or an activation after it, goes into it."""
        kind = activation(node)
        source = node.args[0] if kind is not None else None
        if (
            source is not None
            and self._open(source)
            and only_user(source) is node
            and not source.kwargs.get("gated")
        ):
            new = self.insert(
                node,
                inplace.linear.default,
                source.args,
                {**source.kwargs, "activation": kind},
                node.meta["val"].shape[-1],
            )
            self.replace(node, new)
            return
        for residual, product in operand_orders(node, aten.add.Tensor):
            if (
                not self._open(product)
                or only_user(product) is not node
                or not isinstance(residual, Node)
            ):
                continue
            meta, other = product.meta["val"], residual.meta["val"]
            if (
                not isinstance(other, torch.Tensor)
                or meta.dtype != other.dtype
                or not same_shape(meta, other)
                or node.kwargs
            ):
                continue
            x, weight, bias, norm = (*product.args, None, None)[:4]
            new = self.insert(
                node,
                inplace.linear.default,
                (x, weight, bias, norm, residual),
                dict(product.kwargs),
                meta.shape[-1],
            )
            self.replace(node, new)
            return

    def _head(self, node: AnyNode) -> None:
        """Scores that are turned to float32 are float32 from the start; the extents of 1 around them go."""
        if not is_call(node, aten.to.dtype) or node.meta["val"].dtype != torch.float32:
            return
        source = node.args[0]
        squeezed = (
            source.args[0]
            if is_call(source, aten.select.int)
            and source.args[1:] == (0, 0)
            and only_user(source) is node
            else source
        )
        if (
            not self._open(squeezed)
            or len(squeezed.users) != 1
            or squeezed.kwargs.get("gated")
            or len(squeezed.args) > 4
        ):
            return
        kwargs = {**squeezed.kwargs, "float_out": True}
        new = self.insert(
            squeezed,
            inplace.linear.default,
            squeezed.args,
            kwargs,
            squeezed.meta["val"].shape[-1],
            torch.float32,
        )
        if squeezed is source:
            self.replace(node, new)
            return
        with self.graph.inserting_before(node):
            flat = self.graph.call_function(aten.select.int, (new, 0, 0))
        flat.meta.update(node.meta)
        self.replace(node, flat)

    def _argmax(self, node: AnyNode) -> None:
        if (
            is_call(node, aten.argmax.default)
            and node.args[1:] == (-1, True)
            and node.args[0].meta["val"].dim() == 2
        ):
            scores = node.args[0]
            if scores.meta["val"].dtype in (torch.float32, torch.float16, torch.bfloat16):
                self.replace(
                    node, self.insert(node, inplace.argmax.default, (scores,), {}, 1, torch.int64)
                )

    # Questions

    def _open(self, node: AnyNode) -> bool:
        """A linear layer that could still take an activation or a residual."""
        return (
            isinstance(node, Node)
            and is_call(node, inplace.linear.default)
            and len(node.args) < 5
            and (node.kwargs.get("activation", "none") == "none" or bool(node.kwargs.get("gated")))
        )


def without_sampling(exported: ExportedProgram, program: Program) -> tuple[Fused, Program]:
    """A copy of the graph with argmax in the place of ``inplace::sample`` and without its parameters, and the description of that.

    A graph that samples nothing is copied as it is.
    """
    graph = copy_graph(exported.graph)
    module = torch.fx.GraphModule(exported.graph_module, graph)
    for node in graph.find_nodes(op="call_function", target=inplace.sample.default):
        with graph.inserting_before(node):
            largest = graph.call_function(aten.argmax.default, (node.args[0], -1, True))
        largest.meta.update(node.meta)
        node.replace_all_uses_with(largest)
        graph.erase_node(node)
    gone = {spec.name for spec in program.inputs if spec.role in SAMPLING_ROLES}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in gone:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    signature = copy.deepcopy(exported.graph_signature)
    signature.input_specs = [spec for spec in signature.input_specs if spec.arg.name not in gone]
    (output,) = graph.find_nodes(op="output")
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):
        spec.arg = TensorArgument(name=node.name)
    description = program.model_copy(
        update={
            "inputs": tuple(spec for spec in program.inputs if spec.name not in gone),
            "outputs": tuple(_largest(spec) for spec in program.outputs),
        }
    )
    return Fused(graph, module, signature, exported.state_dict, exported.constants), description


def _largest(spec: TensorSpec) -> TensorSpec:
    if spec.sampled_from is None:
        return spec
    return spec.model_copy(update={"argmax_of": spec.sampled_from, "sampled_from": None})
