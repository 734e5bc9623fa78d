"""The inner loops of the solvers: the codes of a group of columns, all rows at once.

Arrays keep the rows last ([columns, levels, rows]), so that one vector instruction handles one column of many rows.
Every function has two bodies: compiled (native/columns.inl) and the readable one here, which the tests hold against
each other. Rows never meet, so results do not depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import MIN_SCALE, to_half
from . import native

LANES = 16
SHRINK = tuple(1.0 - 0.04 * i for i in range(18))
"""Fractions of a group's range that the clip search tries."""


@dataclass(frozen=True)
class Nest:
    """levels: ascending widths; weights: lambda of each in the choice of a code; beam: prefixes kept per level.

    keep: top bits of a code that `descend` must leave as they are.
    """

    levels: tuple[int, ...]
    weights: tuple[float, ...]
    beam: int = 5
    keep: int = 0

    @property
    def bits(self) -> int:
        return self.levels[-1]


def fit(weight: Tensor, importance: Tensor, levels: tuple[int, ...], symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point [levels, rows] of one group by a clip search.

    weight [columns, levels, rows]; importance [columns] weighs the squared errors (the Hessian's diagonal). For each
    level the range between the smallest and the largest weight is shrunk about its middle; the best fraction wins.
    """
    columns, num_levels, rows = weight.shape
    if _compiled(weight):
        weight = weight.contiguous()
        shrink = torch.tensor(SHRINK)
        scale, zero = torch.empty(num_levels, rows), torch.empty(num_levels, rows)
        importance = importance.float().contiguous()
        native.module.fit(  # type: ignore[union-attr]
            native.columns_path(), list(levels), columns, rows, importance.data_ptr(), weight.data_ptr(),
            shrink.data_ptr(), len(SHRINK), symmetric, scale.data_ptr(), zero.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return scale, zero
    steps = torch.tensor([2.0**r - 1 for r in levels], device=weight.device).unsqueeze(1)
    low, high = weight.amin(dim=0), weight.amax(dim=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    middle, half = 0.5 * (low + high), 0.5 * (high - low)
    # A group far from zero for its width: the zero point must stay within half precision.
    floor = (middle.abs() / 30000).clamp_min(MIN_SCALE)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for fraction in SHRINK:
        s = to_half(torch.maximum(fraction * half * (2.0 / steps), floor))
        z = (0.5 * steps).expand_as(s) if symmetric else to_half(0.5 * steps - middle / s)
        code = torch.minimum((weight / s + z).round().clamp_min(0), steps)
        error = weight - s * (code - z)
        loss = (importance[:, None, None] * error.square()).sum(dim=0)
        better = loss < best
        best, scale, zero = (torch.where(better, a, b) for a, b in ((loss, best), (s, scale), (z, zero)))
    return scale, zero


def greedy(
    nest: Nest, weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [columns, rows] and scaled errors [columns, levels, rows], column after column.

    weight [columns, levels, rows] is what every level still has to represent; upper [columns, columns] is the
    Cholesky factor of the inverse Hessian; scale and zero [groups, levels, rows]; group_of [columns] int32. Each level
    hands its own error to the columns after it (GPTQ, section 3), all share the code that minimises
    sum_r lambda_r (weight_r - value_r(code))².
    """
    columns, _, rows = weight.shape
    codes = torch.zeros(columns, rows, dtype=torch.uint8, device=weight.device)
    error = torch.empty_like(weight)
    if _compiled(weight):
        weight, upper = weight.contiguous(), upper.contiguous()
        native.module.greedy(  # type: ignore[union-attr]
            *_header(nest, columns, rows, scale, zero, group_of), upper.data_ptr(), weight.data_ptr(), codes.data_ptr(),
            error.data_ptr(),
        )  # fmt: skip
        return codes, error
    weight = weight.clone()
    for i in range(columns):
        s, z = scale[group_of[i]], zero[group_of[i]]
        codes[i] = _choose(nest, weight[i], s, z, codes[i])
        error[i] = (weight[i] - _value(nest, codes[i], s, z)) / upper[i, i]
        weight[i + 1 :] -= error[i] * upper[i, i + 1 :, None, None]
    return codes, error


def descend(
    nest: Nest, codes: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent on sum_r lambda_r (W - Q_r) H (W - Q_r)ᵀ.

    gradient [columns, levels, rows] is (W - Q_r) H at these columns, hessian [columns, columns] their own part of H.
    Column i of level r moves towards q_r + gradient_r[i] / H[i, i]; a code is changed only if that lowers the sum.
    Returns the codes uint8 [columns, rows] and the step of their values [columns, levels, rows].
    """
    columns, _, rows = gradient.shape
    codes, steps = codes.clone(), torch.empty_like(gradient, memory_format=torch.contiguous_format)
    if _compiled(gradient):
        gradient, hessian = gradient.contiguous(), hessian.contiguous()
        native.module.descend(  # type: ignore[union-attr]
            *_header(nest, columns, rows, scale, zero, group_of), hessian.data_ptr(), gradient.data_ptr(),
            codes.data_ptr(), steps.data_ptr(),
        )  # fmt: skip
        return codes, steps
    gradient = gradient.clone()
    weights = torch.tensor(nest.weights, device=codes.device).unsqueeze(1)
    for i in range(columns):
        s, z = scale[group_of[i]], zero[group_of[i]]
        now = _value(nest, codes[i], s, z)
        target = now + gradient[i] / hessian[i, i]
        code = _choose(nest, target, s, z, codes[i])
        value = _value(nest, code, s, z)
        gain = (weights * ((target - now).square() - (target - value).square())).sum(dim=0)
        steps[i] = torch.where(gain > 0, value - now, 0.0)
        codes[i] = torch.where(gain > 0, code, codes[i])
        gradient -= steps[i] * hessian[i, :, None, None]
    return codes, steps


def refit(
    nest: Nest, codes: Tensor, weight: Tensor, metric: Tensor, scale: Tensor, zero: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """One group's scale and zero point [levels, rows] by a least squares step, with its codes fixed.

    weight [columns, levels, rows] is what the values of codes uint8 [columns, rows] come nearer to in metric
    [columns, columns]. Values are s u + b, u being the code from its middle, so (ds, db) solves the 2x2 system with
    entries u M u, u M 1, 1 M 1 and right side u G, 1 G, where G = M (weight - values). Rows that the step, rounded to
    half precision, does not improve stay as they are.
    """
    if _compiled(weight):
        scale, zero, metric, weight = scale.clone(), zero.clone(), metric.contiguous(), weight.contiguous()
        ones = metric.sum(dim=0)
        native.module.refit(  # type: ignore[union-attr]
            *_group_header(nest, codes, symmetric), metric.data_ptr(), ones.data_ptr(), codes.data_ptr(),
            weight.data_ptr(), 0, scale.data_ptr(), zero.data_ptr(), 0,
        )  # fmt: skip
        return scale, zero
    gradient = apply(metric, weight - _group_values(nest, codes, scale, zero))
    return _refit(nest, codes, gradient, metric, scale, zero, symmetric)[:2]


def move(
    nest: Nest, codes: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`refit` in the middle of a sweep: gradient [columns, levels, rows] is (W - Q_r) H at this group's columns.

    Returns scale and zero point [levels, rows], the step of the values and the gradient after it, both
    [columns, levels, rows].
    """
    if _compiled(gradient):
        scale, zero, hessian = scale.clone(), zero.clone(), hessian.contiguous()
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        step, ones = torch.empty_like(gradient), hessian.sum(dim=0)
        native.module.refit(  # type: ignore[union-attr]
            *_group_header(nest, codes, symmetric), hessian.data_ptr(), ones.data_ptr(), codes.data_ptr(), 0,
            gradient.data_ptr(), scale.data_ptr(), zero.data_ptr(), step.data_ptr(),
        )  # fmt: skip
        return scale, zero, step, gradient
    new_scale, new_zero, step = _refit(nest, codes, gradient, hessian, scale, zero, symmetric)
    return new_scale, new_zero, step, gradient - apply(hessian, step)


def values(nest: Nest, codes: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor) -> Tensor:
    """[columns, levels, rows] float32 that codes uint8 [columns, rows] stand for at every level."""
    values = []
    for k, level in enumerate(nest.levels):
        one = len(scale) == 1  # every column is of the same group
        s, z = (x[0, k] if one else x[:, k].index_select(0, group_of) for x in (scale, zero))
        values.append(s * ((codes >> (nest.bits - level)).float() - z))
    return torch.stack(values, dim=1)


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [m, n] times x [n, levels, rows] -> [m, levels, rows]."""
    return (matrix @ x.flatten(1)).unflatten(1, x.shape[1:])


def _refit(
    nest: Nest, codes: Tensor, gradient: Tensor, metric: Tensor, scale: Tensor, zero: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and the step of the values for `gradient` = metric (weight - values)."""
    middle = torch.tensor([(2.0**level - 1) / 2 for level in nest.levels], device=codes.device)[:, None]
    centre = zero if symmetric else middle.expand_as(zero)
    unit = _group_values(nest, codes, torch.ones_like(scale), centre)
    moved, ones = apply(metric, unit), metric.sum(dim=0)
    cc, c1, n1 = (unit * moved).sum(0), (unit * ones[:, None, None]).sum(0), ones.sum()
    cg, g1 = (unit * gradient).sum(0), gradient.sum(0)
    offset = scale * (centre - zero)
    if symmetric:
        new_scale, new_zero = to_half(scale + cg / cc.clamp_min(1e-30)), zero
        sane = new_scale >= MIN_SCALE
    else:
        determinant = cc * n1 - c1 * c1
        new_scale = to_half(scale + (n1 * cg - c1 * g1) / determinant.clamp_min(1e-30))
        sane = (new_scale >= MIN_SCALE) & (determinant > 1e-6 * cc * n1)
        new_scale = torch.where(sane, new_scale, scale)
        # With the scale rounded, the best offset follows from the second equation alone.
        new_zero = to_half(centre - (offset + (g1 - c1 * (new_scale - scale)) / n1) / new_scale)
    ds, db = new_scale - scale, new_scale * (centre - new_zero) - offset
    gain = 2 * (ds * cg + db * g1) - (ds * ds * cc + 2 * ds * db * c1 + db * db * n1)
    better = sane & (gain > 0)
    return (
        torch.where(better, new_scale, scale),
        torch.where(better, new_zero, zero),
        torch.where(better, ds * unit + db, 0.0),
    )


def _group_values(nest: Nest, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`values` for one group, scale and zero [levels, rows]."""
    return values(nest, codes, scale[None], zero[None], torch.zeros(len(codes), dtype=torch.int32, device=codes.device))


def _choose(nest: Nest, target: Tensor, scale: Tensor, zero: Tensor, old: Tensor) -> Tensor:
    """uint8 [rows]: the code with the least sum_r lambda_r (target_r - value_r)², by a beam down the tree."""
    if len(nest.levels) == 1 and not nest.keep:
        return (target[0] / scale[0] + zero[0]).clamp(0, 2**nest.bits - 1).round().to(torch.uint8)
    rows = target.shape[1]
    cost = torch.zeros(1, rows, device=target.device)
    code = old.long().unsqueeze(0) >> (nest.bits - nest.keep)
    previous = nest.keep
    for k, level in enumerate(nest.levels):
        children = torch.arange(2 ** (level - previous), device=target.device)
        code = ((code << (level - previous)).unsqueeze(1) + children[:, None]).flatten(0, 1)
        distance = target[k] - scale[k] * (code - zero[k])
        cost = cost.repeat_interleave(len(children), dim=0) + nest.weights[k] * distance.square()
        keep = min(1 if level == nest.bits else nest.beam, len(code))
        cost, best = cost.topk(keep, dim=0, largest=False)
        code = code.gather(0, best)
        previous = level
    return code[0].to(torch.uint8)


def _value(nest: Nest, code: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """[levels, rows] from codes uint8 [rows] and scale, zero [levels, rows]."""
    return torch.stack(
        [scale[k] * ((code >> (nest.bits - level)).float() - zero[k]) for k, level in enumerate(nest.levels)]
    )


def _compiled(x: Tensor) -> bool:
    return native.columns_path() != "torch" and x.device.type == "cpu" and x.shape[-1] % LANES == 0


def _group_header(nest: Nest, codes: Tensor, symmetric: bool) -> tuple[object, ...]:
    assert codes.is_contiguous()
    return native.columns_path(), list(nest.levels), *codes.shape, symmetric, torch.get_num_threads()


def _header(nest: Nest, columns: int, rows: int, scale: Tensor, zero: Tensor, group_of: Tensor) -> tuple[object, ...]:
    assert scale.is_contiguous() and zero.is_contiguous() and group_of.dtype == torch.int32
    return (
        native.columns_path(), list(nest.levels), list(nest.weights), nest.beam, nest.keep, columns, len(scale), rows,
        group_of.data_ptr(), scale.data_ptr(), zero.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
