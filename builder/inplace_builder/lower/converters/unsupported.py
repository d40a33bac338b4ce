"""Operators of core ATen that a network of TensorRT cannot express, and why."""

import torch

from inplace_builder.lower.registry import unsupported

aten = torch.ops.aten


UPDATES_STATISTICS = "it changes its running statistics (training); call .eval() on the model"
"""Why a norm in training mode cannot be lowered."""


unsupported(
    "its result's shape depends on values; use where, or masked_fill",
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
)


unsupported(
    "it draws random numbers; pass them as an input",
    aten.rand.default,
    aten.randn.default,
    aten.randint.default,
    aten.randperm.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.multinomial.default,
    aten.native_dropout.default,
)


unsupported(
    UPDATES_STATISTICS,
    aten._native_batch_norm_legit.default,
)


unsupported(
    "it is part of a backward pass",
    aten._adaptive_avg_pool2d_backward.default,
    aten.avg_pool2d_backward.default,
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices_backward.default,
)
