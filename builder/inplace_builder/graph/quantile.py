"""`torch.quantile` and `torch.nanquantile` without a look at the values.

PyTorch's own ask whether ``q`` is within 0 and 1 in a way that cannot be exported.
"""

import torch
from torch import Tensor

_ROUNDED = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}


def quantile(
    x: Tensor,
    q: float | Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
    ignore_nan: bool = False,
) -> Tensor:
    """As `torch.quantile` documents it; with ``ignore_nan``, as `torch.nanquantile` does.

    Raises:
        ValueError: ``q`` is a number that is not within 0 and 1, or there is no such interpolation.
    """
    if not isinstance(q, Tensor) and not 0 <= q <= 1:
        raise ValueError(f"quantile of {q}, which is not within 0 and 1")
    if interpolation not in (*_ROUNDED, "linear", "midpoint"):
        raise ValueError(f"quantile has no interpolation {interpolation!r}")
    entries = x.flatten() if dim is None else x.movedim(dim, -1)
    ordered = entries.sort(-1)[0]
    places = (q if isinstance(q, Tensor) else x.new_full((), q)).reshape(-1)
    missing = ordered.isnan()
    if ignore_nan:
        ranks = places * (missing.logical_not().sum(-1, keepdim=True) - 1)
        ranks = ranks.clamp(min=0)
    else:
        last = ordered.shape[-1] - 1
        ranks = torch.where(missing.any(-1, keepdim=True), float(last), places * last)
    if interpolation in _ROUNDED:
        result = ordered.gather(-1, _ROUNDED[interpolation](ranks).long())
    else:
        below = ranks.floor()
        weights = ranks - below if interpolation == "linear" else torch.full_like(ranks, 0.5)
        above = ordered.gather(-1, ranks.ceil().long())
        result = torch.lerp(ordered.gather(-1, below.long()), above, weights)
    return _shaped(result, x, q, dim, keepdim)


def _shaped(result: Tensor, x: Tensor, q: float | Tensor, dim: int | None, keepdim: bool) -> Tensor:
    """The quantiles, which are on the last axis, on the first; none if ``q`` has no axes."""
    if keepdim and dim is None:
        result = result.reshape(*[1] * x.dim(), -1)
    elif keepdim:
        result = result.unsqueeze(dim if dim is not None and dim >= 0 else (dim or 0) + x.dim())
    if isinstance(q, Tensor) and q.dim():
        return result.movedim(-1, 0)
    return result.squeeze(-1)
