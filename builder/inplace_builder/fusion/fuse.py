"""Rewrite a captured graph for the kernels of a mechanism.

``fuse`` merges neighbours for the ``plugin`` mechanism. A decode step of a small model is bound by
the number of its kernels, not by their work. A transformer layer in PyTorch is about thirty of
them; after fusion it is five: norm + QKV projection; RoPE + append + attention; output projection +
residual; norm + gate and up projection + activation; down projection + residual. Every rewrite is
local and keeps what is computed; only roundings between the fused operators disappear.

``without_sampling`` replaces sampling by argmax for mechanisms that have no kernel for it.
"""

import itertools
import operator
from collections.abc import Sequence
from functools import partial

import torch
from inplace.schema.programs import Program
from inplace.schema.specs import LOGPROB_ROLES, SAMPLING_OPTION_ROLES, SAMPLING_ROLES, TensorSpec
from torch.export.graph_signature import OutputKind
from torch.fx import Graph, Node

from inplace_builder.fusion.attention import AttentionRewriter
from inplace_builder.fusion.patterns import (
    activation,
    has_no_effect,
    match_rms_norm,
    match_tanh_gelu,
    same_shape,
)
from inplace_builder.graph.nodes import (
    CASTS,
    AnyNode,
    argument,
    is_call,
    only_user,
    operand_orders,
    without_casts,
)
from inplace_builder.graph.program import AnyProgram, GraphProgram

aten, inplace = torch.ops.aten, torch.ops.inplace


def fuse(exported: AnyProgram) -> GraphProgram:
    """A copy fused into ``inplace::linear``, ``rms_norm``, ``qkv_attention`` and ``argmax``.

    Weights made here (merged or transposed) are ``get_attr`` nodes of the graph.
    """
    program = GraphProgram.copy_of(exported)
    _Fusion(program).run()
    program.recompile()
    return program


def bindable_weights(program: GraphProgram) -> frozenset[str]:
    """Names of the weights that the runtime binds, so that the plan does not hold them.

    These are the matrices of linear layers, experts and embeddings, and scales of the first two.
    """
    linear = [node for node in program.graph.nodes if is_call(node, inplace.linear.default)]
    grouped = [
        node for node in program.graph.nodes if is_call(node, inplace.grouped_linear.default)
    ]
    weights = [
        *(node.args[2] for node in grouped),
        *(node.args[1] for node in linear),
        *(node.kwargs.get("scale") for node in (*linear, *grouped)),
        *(node.args[0] for node in program.graph.nodes if is_call(node, aten.embedding.default)),
    ]
    return frozenset(weight.name for weight in weights if isinstance(weight, Node))


class _Fusion(AttentionRewriter):
    def run(self) -> None:
        """Apply every rewrite to every node, one rewrite after the other."""
        for rewrite in (
            self._remove_no_effect,
            self._fuse_norm,
            self._fuse_linear,
            self._fuse_transposed_linear,
            self._fuse_pointwise_convolution,
            self._fuse_gate,
            self._fuse_grouped_gate,
            self.fuse_attention,
            self._fuse_norm_into_linear,
            self._fuse_epilogue,
            self._fuse_float32_scores,
            self._fuse_argmax,
        ):
            for node in list(self.graph.nodes):
                if node.op == "call_function" and (node.users or rewrite == self.fuse_attention):
                    rewrite(node)
            self.graph.eliminate_dead_code(
                lambda node: node.op in ("placeholder", "output") or node.is_impure()
            )

    def _remove_no_effect(self, node: AnyNode) -> None:
        """Remove operators without effect; GELU that is written out becomes one operator."""
        if has_no_effect(node):
            node.replace_all_uses_with(node.args[0])
            self.graph.erase_node(node)  # dead-code elimination keeps dropout: it counts as random
            return
        x = match_tanh_gelu(node)
        if x is not None:
            self.replace(node, self.insert(node, aten.gelu.default, (x,), {"approximate": "tanh"}))

    def _fuse_norm(self, node: AnyNode) -> None:
        """``weight * (x * rsqrt(mean(x²) + eps))``, with or without casts, also ``1 + weight``."""
        if node.target is aten.rms_norm.default:
            self._fuse_norm_operator(node)
            return
        for scale, product in operand_orders(node, aten.mul.Tensor):
            weight, offset = self._norm_weight(scale)
            match = match_rms_norm(without_casts(product))
            if weight is None or match is None:
                continue
            x, eps = match
            if self.weights[weight].shape != x.meta["val"].shape[-1:]:
                continue
            last = node
            if last.meta["val"].dtype != x.meta["val"].dtype:
                cast = only_user(last)
                if not is_call(cast, *CASTS) or cast.meta["val"].dtype != x.meta["val"].dtype:
                    continue
                last = cast
            if offset:
                shifted = partial(torch.add, self.weights[weight].float(), offset)
                weight = self.weight(("offset", weight, offset), last, shifted)
            self.replace(last, self.insert(last, inplace.rms_norm.default, (x, weight, eps), {}))
            return

    def _fuse_norm_operator(self, node: AnyNode) -> None:
        """``aten.rms_norm`` with a weight."""
        x, _, weight, eps = (*node.args, None, None)[:4]
        if weight not in self.weights:
            return
        if eps is None:
            eps = torch.finfo(x.meta["val"].dtype).eps
        self.replace(node, self.insert(node, inplace.rms_norm.default, (x, weight, eps), {}))

    def _norm_weight(self, node: AnyNode) -> tuple[AnyNode, float]:
        """The weight behind a scale, and what is added to it (Gemma scales with 1 + weight)."""
        scale = without_casts(node)
        if scale in self.weights:
            return scale, 0.0
        for one, other in operand_orders(scale, aten.add.Tensor):
            if without_casts(one) in self.weights and isinstance(other, int | float):
                return without_casts(one), float(other)
        return None, 0.0

    def _fuse_linear(self, node: AnyNode) -> None:
        """``aten.linear`` with weights of the model; with 8-bit weights it is ours already."""
        if is_call(node, inplace.linear.default) and len(node.args) == 2:
            node.args = (*node.args, None)  # export leaves out what is the default
        if not is_call(node, aten.linear.default):
            return
        x, weight, bias = (*node.args, None)[:3]
        if weight not in self.weights or (bias is not None and bias not in self.weights):
            return
        width = node.meta["val"].shape[-1]
        new = self.insert(node, inplace.linear.default, (x, weight, bias), {}, width)
        self.replace(node, new)

    def _fuse_transposed_linear(self, node: AnyNode) -> None:
        """``addmm(bias, x, weight)``: GPT-2's Conv1D holds its weights transposed.

        An LSTM's are those of a linear layer, behind a transposition.
        """
        if not is_call(node, aten.addmm.default) or len(node.args) != 3 or node.kwargs:
            return
        bias, x, transposed = node.args
        weight = transposed.args[0] if is_call(transposed, aten.t.default) else transposed
        if bias not in self.weights or weight not in self.weights or self.weights[bias].dim() != 1:
            return
        if weight is transposed:
            weight = self.weight(("transposed", weight), node, self.weights[weight].t)
        outputs, inputs = self.weights[weight].shape
        flat = (
            is_call(x, aten.view.default, aten.reshape.default)
            and x.args[0].meta["val"].shape[-1] == inputs
        )
        args = (x.args[0] if flat else x, weight, bias)
        new = self.insert(node, inplace.linear.default, args, {}, outputs)
        for user in list(node.users) if flat else ():  # the tokens were flattened for addmm only
            if is_call(user, aten.view.default, aten.reshape.default) and same_shape(
                user.meta["val"], new.meta["val"]
            ):
                self.replace(user, new)
        if flat and any(user is not new for user in node.users):
            with self.graph.inserting_before(node):
                again = self.graph.call_function(aten.view.default, (new, [-1, outputs]))
            again.meta.update(node.meta)
            new = again
        self.replace(node, new)

    def _fuse_pointwise_convolution(self, node: AnyNode) -> None:
        """A convolution with a kernel of one entry is a linear layer over the channels.

        As a convolution its weights are constants of the plan, which TensorRT tunes for each range
        of rows.
        """
        if not is_call(node, aten.conv1d.default, aten.conv2d.default):
            return
        x, kernel, bias = node.args[0], node.args[1], argument(node, 2, "bias", None)
        if kernel not in self.weights or (bias is not None and bias not in self.weights):
            return
        outputs, _, *extents = self.weights[kernel].shape
        strides, padding = argument(node, 3, "stride", [1]), argument(node, 4, "padding", [0])
        ones = {*extents, *strides, argument(node, 6, "groups", 1)}
        if ones != {1} or any(padding):
            return
        rank = x.meta["val"].dim()
        channels = rank - 1 - len(extents)
        last = [axis for axis in range(rank) if axis != channels] + [channels]
        weight = self.weight(("flat", kernel), node, partial(self.weights[kernel].flatten, 1))
        linear = self.insert(
            node, inplace.linear.default, (self._permuted(node, x, last), weight, bias), {}, outputs
        )
        self.replace(node, self._permuted(node, linear, [last.index(axis) for axis in range(rank)]))

    def _permuted(self, before: AnyNode, x: AnyNode, order: list[int]) -> AnyNode:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(aten.permute.default, (x, order))
        node.meta.update(before.meta)
        source = x.meta["val"]
        with source.fake_mode:
            node.meta["val"] = source.permute(order)
        return node

    def _fuse_gate(self, node: AnyNode) -> None:
        """``activation(linear(x, gate)) * linear(x, up)`` becomes one gated layer."""
        for activated, up in operand_orders(node, aten.mul.Tensor):
            kind = activation(activated)
            if kind is None or only_user(activated) is not node:
                continue
            gate = activated.args[0]
            if not (
                self.is_unfused_linear(gate)
                and self.is_unfused_linear(up)
                and gate.args[0] is up.args[0]
            ):
                continue
            if (
                only_user(gate) is not activated
                or only_user(up) is not node
                or (gate.args[2] is None) != (up.args[2] is None)
                or not self.have_scales_alike([gate, up])
            ):
                continue
            weight, bias, scales = self.concatenate_weights([gate, up], node)
            args = (gate.args[0], weight, bias)
            options = {"activation": kind, "gated": True, **scales}
            width = node.meta["val"].shape[-1]
            self.replace(node, self.insert(node, inplace.linear.default, args, options, width))
            return

    def _fuse_grouped_gate(self, node: AnyNode) -> None:
        """``activation(gate) * up``, the two halves of what experts project to, becomes a part."""
        for activated, up in operand_orders(node, aten.mul.Tensor):
            kind = activation(activated)
            if kind is None or only_user(activated) is not node:
                continue
            gate = activated.args[0]
            halves = gate.args[0] if is_call(gate, operator.getitem) else None
            if (
                not is_call(halves, aten.chunk.default)
                or not is_call(up, operator.getitem)
                or up.args[0] is not halves
                or (gate.args[1], up.args[1]) != (0, 1)
                or only_user(gate) is not activated
                or only_user(up) is not node
            ):
                continue
            source, count, axis = (*halves.args, 0)[:3]
            grouped = inplace.grouped_linear.default
            if (
                not is_call(source, grouped)
                or only_user(source) is not halves
                or source.kwargs.get("gated")
                or (count, axis % 3) != (2, 2)
                or gate.meta["val"].shape[-1] != up.meta["val"].shape[-1]
            ):
                continue
            options = {**source.kwargs, "activation": kind, "gated": True}
            with self.graph.inserting_before(node):
                new = self.graph.call_function(grouped, source.args, options)
            new.meta.update(node.meta)
            self.replace(node, new)
            return

    def _fuse_norm_into_linear(self, node: AnyNode) -> None:
        """A norm that only one linear layer reads becomes part of that layer."""
        if not is_call(node, inplace.rms_norm.default):
            return
        user = only_user(node)
        if not (
            is_call(user, inplace.linear.default)
            and user.args[0] is node
            and (len(user.args) < 4 or user.args[3] is None)
        ):
            user = self._head_of(node)
            if user is None:
                return
        x, weight, eps = node.args
        source = x if user.args[0] is node else self._index_before_norm(user, x)
        user.args = (source, *user.args[1:3], weight)
        user.kwargs = {**user.kwargs, "eps": eps}

    def _head_of(self, norm: AnyNode) -> AnyNode:
        """The head of a language model, where it follows norm and pick of each row's last token.

        The pick can come before the norm.
        """
        index = only_user(norm)
        if index is None or not is_call(index, aten.index.Tensor):
            return None
        indices = index.args[1]
        if any(i is None for i in indices[-1:]) or len(indices) >= norm.meta["val"].dim():
            return None
        head = only_user(index)
        return head if is_call(head, inplace.linear.default) and head.args[0] is index else None

    def _index_before_norm(self, head: AnyNode, x: AnyNode) -> AnyNode:
        index = head.args[0]
        with self.graph.inserting_before(index):
            moved = self.graph.call_function(aten.index.Tensor, (x, index.args[1]))
        moved.meta.update(index.meta)
        return moved

    def _fuse_epilogue(self, node: AnyNode) -> None:
        """A residual added to a linear layer, or an activation after it, becomes part of it."""
        kind = activation(node)
        source: AnyNode = node.args[0] if kind is not None else None
        if (
            self._accepts_epilogue(source)
            and only_user(source) is node
            and not source.kwargs.get("gated")
        ):
            options, width = {**source.kwargs, "activation": kind}, node.meta["val"].shape[-1]
            new = self.insert(node, inplace.linear.default, source.args, options, width)
            self.replace(node, new)
            return
        for residual, product in operand_orders(node, aten.add.Tensor):
            if (
                not self._accepts_epilogue(product)
                or only_user(product) is not node
                or not isinstance(residual, Node)
            ):
                continue
            meta, other = product.meta["val"], residual.meta["val"]
            if (
                not isinstance(other, torch.Tensor)
                or meta.dtype != other.dtype
                or not same_shape(meta, other)
            ):
                continue
            x, weight, bias, norm = (*product.args, None, None)[:4]
            args = (x, weight, bias, norm, residual)
            options = dict(product.kwargs)
            new = self.insert(node, inplace.linear.default, args, options, meta.shape[-1])
            self.replace(node, new)
            return

    def _fuse_float32_scores(self, node: AnyNode) -> None:
        """Scores that are cast to float32 are float32 from the start, without axes of extent 1."""
        if not is_call(node, aten.to.dtype) or node.meta["val"].dtype != torch.float32:
            return
        source = node.args[0]
        selected = (
            is_call(source, aten.select.int)
            and source.args[1:] == (0, 0)
            and only_user(source) is node
        )
        linear = source.args[0] if selected else source
        if (
            not self._accepts_epilogue(linear)
            or len(linear.users) != 1
            or linear.kwargs.get("gated")
            or len(linear.args) > 4
        ):
            return
        options, width = {**linear.kwargs, "float_out": True}, linear.meta["val"].shape[-1]
        new = self.insert(
            linear, inplace.linear.default, linear.args, options, width, torch.float32
        )
        if not selected:
            self.replace(node, new)
            return
        with self.graph.inserting_before(node):
            flat = self.graph.call_function(aten.select.int, (new, 0, 0))
        flat.meta.update(node.meta)
        self.replace(node, flat)

    def _fuse_argmax(self, node: AnyNode) -> None:
        """``argmax(scores, -1, keepdim=True)`` of ``[rows, vocabulary]`` scores."""
        if not is_call(node, aten.argmax.default) or node.args[1:] != (-1, True):
            return
        scores = node.args[0]
        dtype = scores.meta["val"].dtype
        if scores.meta["val"].dim() == 2 and dtype in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        ):
            new = self.insert(node, inplace.argmax.default, (scores,), {}, 1, torch.int64)
            self.replace(node, new)

    def _accepts_epilogue(self, node: AnyNode) -> bool:
        """Whether it is a linear layer that could still take an activation or a residual."""
        return (
            isinstance(node, Node)
            and is_call(node, inplace.linear.default)
            and len(node.args) < 5
            and (node.kwargs.get("activation", "none") == "none" or bool(node.kwargs.get("gated")))
        )


def without_sampling(exported: AnyProgram, program: Program) -> tuple[GraphProgram, Program]:
    """A copy of the graph with argmax instead of ``inplace::sample``, and its description.

    The inputs that only sampling needs are removed. A graph that does not sample is copied as it
    is.
    """
    greedy = GraphProgram.copy_of(exported)
    graph = greedy.graph
    kept = [spec.role not in LOGPROB_ROLES for spec in program.outputs]
    _drop_outputs(greedy, kept)
    for node in graph.find_nodes(op="call_function", target=inplace.sample.default):
        _replace_by_argmax(graph, node, node.args[0])
    for node in graph.find_nodes(op="call_function", target=inplace.sample.options):
        for part in list(node.users):
            if part.args[1] == 0:
                _replace_by_argmax(graph, part, node.args[0])
            else:
                graph.erase_node(part)
        graph.erase_node(node)
    roles = {*SAMPLING_ROLES, *SAMPLING_OPTION_ROLES}
    removed = {spec.name for spec in program.inputs if spec.role in roles}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in removed:
            graph.erase_node(node)
    greedy.graph_signature.input_specs = [
        spec for spec in greedy.graph_signature.input_specs if spec.arg.name not in removed
    ]
    greedy.recompile()
    description = program.model_copy(
        update={
            "inputs": tuple(spec for spec in program.inputs if spec.name not in removed),
            "outputs": tuple(
                _greedy_output(spec) for spec in itertools.compress(program.outputs, kept)
            ),
        }
    )
    return greedy, description


def _drop_outputs(exported: GraphProgram, kept: Sequence[bool]) -> None:
    """Drop the outputs that are not kept."""
    if all(kept):
        return
    signature, output = exported.graph_signature, exported.graph.output_node()
    is_kept = iter(kept)
    keeps = [
        spec.kind is not OutputKind.USER_OUTPUT or next(is_kept) for spec in signature.output_specs
    ]
    signature.output_specs = list(itertools.compress(signature.output_specs, keeps))
    returned = output.args[0]
    assert isinstance(returned, Sequence)
    output.args = (tuple(itertools.compress(returned, keeps)),)


def _replace_by_argmax(graph: Graph, node: Node, scores: Node) -> None:
    """Replace what a node samples by the index of the largest score."""
    with graph.inserting_before(node):
        largest = graph.call_function(aten.argmax.default, (scores, -1, True))
    largest.meta.update(node.meta)
    node.replace_all_uses_with(largest)
    graph.erase_node(node)


def _greedy_output(spec: TensorSpec) -> TensorSpec:
    if spec.sampled_from is None:
        return spec
    return spec.model_copy(update={"argmax_of": spec.sampled_from, "sampled_from": None})
