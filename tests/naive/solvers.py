"""Slow, obvious twins of the solvers: double precision, one weight at a time, every code tried."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHRINK = [1.0 - 0.04 * i for i in range(18)]


def half(x: Array | float) -> Array:
    return np.asarray(x, dtype=np.float32).astype(np.float16).astype(np.float64)


def fit_group(weights: Array, importance: Array, level: int) -> tuple[float, float]:
    """Scale and zero point of one row's group by trying every shrink."""
    steps = 2**level - 1
    middle, radius = (weights.min() + weights.max()) / 2, (weights.max() - weights.min()) / 2
    best = (np.inf, 0.0, 0.0)
    for shrink in SHRINK:
        scale = float(half(max(shrink * radius * 2 / steps, abs(middle) / 30000, 2.0**-24)))
        zero = float(half(steps / 2 - middle / scale))
        codes = np.clip(np.rint(weights / scale + zero), 0, steps)
        loss = float((importance * (weights - scale * (codes - zero)) ** 2).sum())
        if loss < best[0]:
            best = (loss, scale, zero)
    return best[1], best[2]


def nested(
    weight: Array, hessian: Array, levels: tuple[int, ...], weights: tuple[float, ...], group_size: int
) -> tuple[NDArray[np.uint8], Array, Array]:
    """Greedy nested codes [out, in], scale and zero point [levels, out, groups], row by row, all codes of every weight
    scored; no refit, no descent. With one level this is GPTQ."""
    out_features, width = weight.shape
    bits = levels[-1]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    groups = -(-width // group_size)
    codes = np.zeros(weight.shape, dtype=np.uint8)
    scale, zero = np.zeros((len(levels), out_features, groups)), np.zeros((len(levels), out_features, groups))
    candidates = np.arange(2**bits)
    for row in range(out_features):
        streams = [weight[row].copy() for _ in levels]
        for i in range(width):
            g = i // group_size
            if i % group_size == 0:
                columns = slice(i, min(i + group_size, width))
                for k, level in enumerate(levels):
                    scale[k, row, g], zero[k, row, g] = fit_group(streams[k][columns], np.diag(hessian)[columns], level)
            values = [
                scale[k, row, g] * ((candidates >> (bits - level)) - zero[k, row, g]) for k, level in enumerate(levels)
            ]
            cost = sum(weights[k] * (streams[k][i] - values[k]) ** 2 for k in range(len(levels)))
            codes[row, i] = code = int(np.argmin(cost))
            for k in range(len(levels)):
                error = (streams[k][i] - values[k][code]) / upper[i, i]
                streams[k][i:] -= error * upper[i, i:]
    return codes, scale, zero


def objective(weight: Array, decoded: list[Array], hessian: Array, weights: tuple[float, ...]) -> Array:
    """[out] sum over levels of weight_r (w - q_r) H (w - q_r)ᵀ."""
    return sum(  # type: ignore[return-value]
        w * np.einsum("oi,ij,oj->o", weight - q, hessian, weight - q) for w, q in zip(weights, decoded, strict=True)
    )


def descend(
    weight: Array, hessian: Array, codes: NDArray[np.uint8], scale: Array, zero: Array, levels: tuple[int, ...],
    weights: tuple[float, ...],
) -> NDArray[np.uint8]:  # fmt: skip
    """One pass of coordinate descent over one group's columns, every code tried by computing the whole objective.

    scale, zero [levels, out]."""
    codes = codes.copy()
    bits = levels[-1]

    def total(row: int, trial: NDArray[np.uint8]) -> float:
        loss = 0.0
        for k, level in enumerate(levels):
            d = weight[row] - scale[k, row] * ((trial >> (bits - level)) - zero[k, row])
            loss += weights[k] * float(d @ hessian @ d)
        return loss

    for row in range(len(weight)):
        for i in range(weight.shape[1]):
            losses = []
            for code in range(2**bits):
                trial = codes[row].copy()
                trial[i] = code
                losses.append(total(row, trial))
            if min(losses) < losses[codes[row, i]]:
                codes[row, i] = int(np.argmin(losses))
    return codes


def group_loss(weight: Array, codes: Array, metric: Array, scale: float, zero: float) -> float:
    """(w - v) M (w - v) with v = scale (code - zero); weight and codes [in]."""
    rest = weight - scale * (codes - zero)
    return float(rest @ metric @ rest)


def refit_group(weight: Array, codes: Array, metric: Array, zero: float | None) -> tuple[float, float]:
    """The scale and zero point with the least `group_loss`; a given zero point stays."""
    root = np.linalg.cholesky(metric).T
    if zero is not None:
        (scale,), *_ = np.linalg.lstsq(root @ (codes - zero)[:, None], root @ weight, rcond=None)
        return float(scale), zero
    (scale, offset), *_ = np.linalg.lstsq(root @ np.stack([codes, np.ones_like(codes)], 1), root @ weight, rcond=None)
    return float(scale), float(-offset / scale)


def gptq_on(
    weight: Array, hessian: Array, numbers: list[list[Array]], group_size: int, order: list[int]
) -> tuple[NDArray[np.intp], Array]:
    """GPTQ as its section 3.2 tells it: the nearest of `numbers[row][group]`, the best update of all that is left, and
    the column leaves the inverse Hessian. Codes and values [out, in]."""
    codes, values = np.zeros(weight.shape, dtype=np.intp), np.zeros(weight.shape)
    for row in range(len(weight)):
        rest, left, inverse = weight[row].copy(), list(order), np.linalg.inv(hessian[np.ix_(order, order)])
        while left:
            column = left[0]
            table = numbers[row][column // group_size]
            codes[row, column] = code = int(np.argmin(np.abs(table - rest[column])))
            values[row, column] = table[code]
            rest[left] -= (rest[column] - table[code]) / inverse[0, 0] * inverse[:, 0]
            inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
            left = left[1:]
    return codes, values


def refit_row(weight: Array, codes: Array, metric: Array, group_size: int, symmetric: bool, middle: float) -> Array:
    """Values [in] of the scales and offsets of all groups together that fit a row's codes best."""
    groups = -(-len(weight) // group_size)
    basis = np.zeros((len(weight), groups * (1 if symmetric else 2)))
    for i in range(len(weight)):
        basis[i, i // group_size] = codes[i] - middle
        if not symmetric:
            basis[i, groups + i // group_size] = 1.0
    root = np.linalg.cholesky(metric).T
    found, *_ = np.linalg.lstsq(root @ basis, root @ weight, rcond=None)
    return basis @ found


def sign_stack(weight: Array, scale: Array, rank: int, blocks: int) -> list[Array]:
    """What every further block of BitStack makes of `weight` [out, in] scaled by `scale` [in]."""
    rest, total, found = weight * scale, np.zeros_like(weight), []
    for _ in range(blocks):
        left, values, right = np.linalg.svd(np.abs(rest))
        size = sum(values[k] * np.outer(left[:, k], right[k]) for k in range(rank))
        block = np.where(rest >= 0, size, -size)
        rest, total = rest - block, total + block / scale
        found.append(total.copy())
    return found


def hqq(
    group: Array, bits: int, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, rounds: int = 20
) -> tuple[float, float]:
    """Scale and zero point of one group by half-quadratic splitting, one weight at a time; the best round's."""
    top = 2**bits - 1
    scale = float(half((group.max() - group.min()) / top))
    zero = float(half(-group.min() / scale))
    best = (np.inf, zero)
    for _ in range(rounds + 1):
        codes = [min(max(np.rint(w / scale + zero), 0), top) for w in group]
        errors = [w - scale * (code - zero) for w, code in zip(group, codes, strict=True)]
        loss = sum(abs(error) ** p for error in errors)
        if loss < best[0]:
            best = (loss, zero)
        sparse = [np.sign(e) * max(abs(e) - max(abs(e), 1e-12) ** (p - 1) / beta, 0.0) for e in errors]
        means = [code - (w - s) / scale for code, w, s in zip(codes, group, sparse, strict=True)]
        zero = float(half(sum(means) / len(means)))
        beta *= kappa
    return scale, best[1]
