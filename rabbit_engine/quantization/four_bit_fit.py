"""Fits four-bit codes, a scale and a zero to each group of values, for a small squared error.

From a range somewhat narrower than the group's, codes and factors are fitted to each other in turn: the nearest codes for the
factors, the least squares' factors for the codes. Factors are rounded as they will be stored before codes are chosen.
"""

from __future__ import annotations

import torch

_LEVELS = 16
_LOWEST, _HIGHEST = -8, 7
_FIRST_RANGE = 0.95
_FITS = 5
_AT_ONCE = 2**19
"""Values that are fitted together: few enough for a processor's caches, enough to hide the cost of calling torch."""


def fit_groups(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`values` [groups, size]: codes uint8 [groups, size], scales and zeros [groups] in `dtype`.

    A value is near `(code - 8) * scale + zero`. Raises ValueError for values that are not finite.
    """
    groups, size = values.shape
    codes = torch.empty(groups, size, dtype=torch.uint8, device=values.device)
    factors = torch.empty(2, groups, 1, dtype=dtype, device=values.device)
    at_once = max(1, _AT_ONCE // size)
    for some, some_codes, some_factors in zip(
        values.split(at_once), codes.split(at_once), factors.split(at_once, dim=1), strict=True
    ):
        single = some.float()
        scale, zero = _best_factors(single, dtype)
        some_factors[0], some_factors[1] = scale, zero
        some_codes.copy_(_nearest(single, scale, zero, torch.empty_like(single)) - _LOWEST)
    if not factors.isfinite().all():
        raise ValueError("it has values that are not finite")
    return codes, factors[0, :, 0], factors[1, :, 0]


def _best_factors(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 `values` [groups, size]: the best scales and zeros [groups, 1] of all fits, float32 but rounded to `dtype`."""
    size = values.shape[1]
    lowest, highest = torch.aminmax(values, dim=1, keepdim=True)
    scale = (highest - lowest) * (_FIRST_RANGE / (_LEVELS - 1))
    zero = (highest + lowest + scale) / 2
    total = values.sum(dim=1, keepdim=True)
    codes, products = torch.empty_like(values), torch.empty_like(values)
    least, best_scale, best_zero = torch.full_like(scale, torch.inf), torch.zeros_like(scale), torch.zeros_like(zero)
    for _ in range(_FITS):
        scale, zero = scale.to(dtype).float(), zero.to(dtype).float()
        _nearest(values, scale, zero, codes)
        code_total = codes.sum(dim=1, keepdim=True)
        squares = torch.mul(codes, codes, out=products).sum(dim=1, keepdim=True)
        shared = torch.mul(codes, values, out=products).sum(dim=1, keepdim=True)
        # the squared error, less the sum of squared values
        error = scale * (scale * squares - 2 * shared) + zero * (size * zero - 2 * total + 2 * scale * code_total)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        spread = size * squares - code_total * code_total
        scale = torch.where(spread > 0, (size * shared - code_total * total) / spread, scale)
        zero = (total - scale * code_total) / size
    return best_scale, torch.where(least.isfinite(), best_zero, torch.nan)


def _nearest(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The codes nearest to `values`, from _LOWEST to _HIGHEST, in float32 `out`."""
    inverse = torch.where(scale != 0, 1 / scale, 0)
    return torch.sub(values, zero, out=out).mul_(inverse).round_().clamp_(_LOWEST, _HIGHEST)
