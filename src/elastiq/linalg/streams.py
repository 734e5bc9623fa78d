"""Codes that serve several levels at once: one error stream per level, then coordinate descent.

With a single level this is GPTQ (Frantar et al. 2023, algorithm 1) followed by the same descent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core import MIN_SCALE, Grid, derive, to_half
from . import columns
from .columns import LANES, Nest
from .threads import in_chunks

LOW = 4
"""Widest level that refinement leaves alone."""
ROW_CHUNK = 128
"""Rows solved together: bounds the memory. Chunks are solved in parallel, each by one thread, so that the number of
threads changes no bit."""


@dataclass(frozen=True)
class Search:
    """How hard to look.

    refits: rounds of scale refit per group in the greedy pass. passes: sweeps of descent after it.
    refines: sweeps, at last, over the levels above `LOW` bits alone, with the codes of the others as they are.
    block_size: columns per lazy update; changes no code.
    """

    refits: int
    passes: int
    refines: int
    block_size: int


def solve(
    weight: Tensor,
    hessian: Tensor,
    upper: Tensor,
    nest: Nest,
    grid: Grid,
    search: Search,
    order: Tensor | None = None,
) -> tuple[Tensor, Grid]:
    """Codes uint8 [out, in] for `weight` [out, in], and the grid of the levels of `nest` that they are read on.

    hessian [in, in] (damped); upper: Cholesky factor of its inverse; both already permuted by `order` [in] if given.
    Without `order` the groups are visited one after the other and every level fits its scales on its own compensated
    weights; with it the columns are visited in that order on the scales of `grid`.
    """

    def solve_rows(rows: slice) -> _Part:
        state = _State.of_rows(weight[rows], hessian, nest, search, grid, order)
        if order is None:
            state.greedy_by_group(upper)
        else:
            state.greedy_in_order(upper, grid, rows)
        for _ in range(search.passes):
            state.descend()
        state.refine()
        return state.part(len(weight[rows]), order)

    codes, scale, zero = _by_rows(solve_rows, len(weight))
    return codes, Grid(nest.levels, grid.group_size, scale, zero, grid.symmetric)


def refit_lower_levels(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, levels: tuple[int, ...]) -> Grid:
    """The grid of `levels` for finished top-level `codes` uint8 [out, in].

    The top level (the only one `grid` needs to have) stays as it is; every lower one starts with its cells centred and
    takes two sweeps of least squares steps on scale and zero point in the metric of `hessian` [in, in].
    """
    lower = tuple(level for level in levels if level < grid.bits)
    if not lower:
        return grid
    nest = Nest(lower, (1.0,) * len(lower))
    top_scale, top_zero = grid.parameters(grid.bits)
    start = [derive(top_scale, top_zero, grid.bits, level) for level in lower]
    scale, zero = (to_half(torch.stack(x)) for x in zip(*start, strict=True))
    middle = torch.tensor([(2.0**level - 1) / 2 for level in lower], device=zero.device)
    zero = middle[:, None, None].expand_as(zero) if grid.symmetric else zero
    begin = Grid(lower, grid.group_size, scale.clamp_min(MIN_SCALE), zero, grid.symmetric)

    def refit_rows(rows: slice) -> _Part:
        state = _State.of_rows(weight[rows], hessian, nest, Search(0, 0, 0, 0), begin, None)
        state.start_from(begin, rows, codes[rows] >> (grid.bits - lower[-1]))
        for _ in range(2):
            state.move_scales()
        return state.part(len(weight[rows]), None)

    _, scale, zero = _by_rows(refit_rows, len(weight))
    scale, zero = torch.cat([scale, top_scale[None]]), torch.cat([zero, top_zero[None]])
    return Grid((*lower, grid.bits), grid.group_size, scale, zero, grid.symmetric)


_Part = tuple[Tensor, Tensor, Tensor]
"""Codes [rows, in], scale and zero point [levels, rows, groups] of some rows."""


def _by_rows(solve: Callable[[slice], _Part], num_rows: int) -> _Part:
    """The results of `solve` for chunks of all rows, put together."""
    chunks = [slice(first, first + ROW_CHUNK) for first in range(0, num_rows, ROW_CHUNK)]
    codes, scale, zero = zip(*in_chunks(solve, chunks), strict=True)
    return torch.cat(codes), torch.cat(scale, dim=1), torch.cat(zero, dim=1)


class _State:
    """Codes and grids of one chunk of rows while they are being improved; columns first, rows last."""

    def __init__(
        self, original: Tensor, hessian: Tensor, nest: Nest, search: Search, symmetric: bool, group_of: Tensor
    ):
        self.original, self.hessian = original, hessian
        self.nest, self.search, self.symmetric, self.group_of = nest, search, symmetric, group_of
        width, rows = original.shape
        groups = int(group_of.max()) + 1
        self.codes = torch.zeros(width, rows, dtype=torch.uint8, device=original.device)
        self.scale = torch.ones(groups, len(nest.levels), rows, device=original.device)
        self.zero = torch.zeros_like(self.scale)
        self.gradient: Tensor | None = None

    @staticmethod
    def of_rows(
        weight: Tensor, hessian: Tensor, nest: Nest, search: Search, grid: Grid, order: Tensor | None
    ) -> _State:
        """For rows `weight` [rows, in], padded to whole vectors by repeating the first."""
        width = weight.shape[1]
        original = _pad_rows(weight).T.contiguous()
        group_of = torch.arange(width, dtype=torch.int32, device=weight.device) // grid.group_size
        if order is not None:
            original, group_of = original[order], group_of[order]
        return _State(original, hessian, nest, search, grid.symmetric, group_of)

    def start_from(self, grid: Grid, rows: slice, codes: Tensor | None = None) -> None:
        """Take the scales of `grid` at these rows, and `codes` [rows, in] where given."""
        for k, level in enumerate(self.nest.levels):
            scale, zero = grid.parameters(level)
            self.scale[:, k], self.zero[:, k] = _pad_rows(scale[rows]).T, _pad_rows(zero[rows]).T
        if codes is not None:
            self.codes = _pad_rows(codes).T.contiguous()

    def greedy_in_order(self, upper: Tensor, grid: Grid, rows: slice) -> None:
        """One greedy pass over all columns on the scales of `grid`."""
        self.start_from(grid, rows)
        weight = self.original.unsqueeze(1).repeat(1, len(self.nest.levels), 1)
        self.codes, _ = self._greedy(weight, upper, self.scale, self.zero, self.group_of)

    def greedy_by_group(self, upper: Tensor) -> None:
        """Group after group: fit scales, choose codes, refit the scales, choose again, hand the error on."""
        rest = self.original.unsqueeze(1).repeat(1, len(self.nest.levels), 1)
        diagonal = self.hessian.diagonal()
        for g, at in enumerate(self._groups()):
            weight, factor = rest[at], upper[at, at]
            local = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
            scale, zero = columns.fit(weight, diagonal[at], self.nest.levels, self.symmetric)
            codes, error = self._greedy(weight, factor, scale[None], zero[None], local)
            metric = torch.cholesky_inverse(factor, upper=True)
            for _ in range(self.search.refits):
                trial = columns.refit(self.nest, codes, weight, metric, scale, zero, self.symmetric)
                new_codes, new_error = self._greedy(weight, factor, trial[0][None], trial[1][None], local)
                better = self._weighted(new_error) < self._weighted(error)
                scale, zero = torch.where(better, trial[0], scale), torch.where(better, trial[1], zero)
                error, codes = torch.where(better, new_error, error), torch.where(better, new_codes, codes)
            self.codes[at], self.scale[g], self.zero[g] = codes, scale, zero
            _subtract(rest[at.stop :], upper[at, at.stop :].T, error)

    def part(self, rows: int, order: Tensor | None) -> _Part:
        """The results for the first `rows` rows, columns in their natural order."""
        codes = self.codes if order is None else self.codes[order.argsort()]
        scale, zero = (x.permute(1, 2, 0)[:, :rows] for x in (self.scale, self.zero))
        return codes.T[:rows], scale, zero

    def descend(self) -> None:
        """One sweep: every group moves its scales, then its codes, against the gradient of the whole rows' error."""
        gradient = self._gradient()
        if bool((self.group_of.diff() < 0).any()):  # act_order: no block of columns is a group
            size = self.search.block_size
            for first in range(0, len(self.codes), size):
                at = slice(first, min(first + size, len(self.codes)))
                grid = self.scale, self.zero, self.group_of[at].contiguous()
                _subtract(gradient, self.hessian[:, at], self._move_codes(at, gradient[at], *grid))
            return
        for g, at in enumerate(self._groups()):
            step, local = self._move_group(g, at, gradient[at])
            grid = self.scale[g : g + 1], self.zero[g : g + 1], torch.zeros_like(self.group_of[at])
            _subtract(gradient, self.hessian[:, at], step.add_(self._move_codes(at, local, *grid)))

    def refine(self) -> None:
        """Sweeps over the levels above `LOW` bits, whose bits below are free once the lower levels are settled."""
        kept = sum(level <= LOW for level in self.nest.levels)
        if not self.search.refines or not 0 < kept < len(self.nest.levels):
            return
        nest = Nest(self.nest.levels[kept:], self.nest.weights[kept:], self.nest.beam, self.nest.levels[kept - 1])
        high = _State(self.original, self.hessian, nest, self.search, self.symmetric, self.group_of)
        high.codes = self.codes
        high.scale, high.zero = self.scale[:, kept:].contiguous(), self.zero[:, kept:].contiguous()
        high.gradient = self._gradient()[:, kept:].contiguous()
        for _ in range(self.search.refines):
            high.descend()
        self.scale[:, kept:], self.zero[:, kept:] = high.scale, high.zero

    def move_scales(self) -> None:
        """One sweep over the groups' scales with all codes fixed."""
        gradient = self._gradient()
        for g, at in enumerate(self._groups()):
            _subtract(gradient, self.hessian[:, at], self._move_group(g, at, gradient[at])[0])

    def _gradient(self) -> Tensor:
        """(W - Q_r) H, [columns, levels, rows]: computed once, then kept up to date by the sweeps."""
        if self.gradient is None:
            values = columns.values(self.nest, self.codes, self.scale, self.zero, self.group_of)
            self.gradient = columns.apply(self.hessian, self.original.unsqueeze(1) - values)
        return self.gradient

    def _move_codes(self, at: slice, gradient: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor) -> Tensor:
        """One pass of descent over the codes of these columns; returns the step of their values."""
        hessian = self.hessian[at, at]
        self.codes[at], step = columns.descend(self.nest, self.codes[at], gradient, hessian, scale, zero, group_of)
        return step

    def _move_group(self, g: int, at: slice, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Step group g's scales; returns the step of its values and the gradient [columns, levels, rows] after it."""
        self.scale[g], self.zero[g], step, gradient = columns.move(
            self.nest, self.codes[at], gradient, self.hessian[at, at], self.scale[g], self.zero[g], self.symmetric
        )
        return step, gradient

    def _groups(self) -> list[slice]:
        edges = [0, *(torch.nonzero(self.group_of.diff()).flatten() + 1).tolist(), len(self.codes)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def _greedy(
        self, weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`columns.greedy` with the columns beyond a block updated once per block."""
        size = self.search.block_size
        if len(weight) <= size:
            return columns.greedy(self.nest, weight, upper, scale, zero, group_of)
        weight, codes, errors = weight.clone(), [], []
        for first in range(0, len(weight), size):
            at = slice(first, first + size)
            code, error = columns.greedy(self.nest, weight[at], upper[at, at], scale, zero, group_of[at].contiguous())
            _subtract(weight[first + size :], upper[at, first + size :].T, error)
            codes.append(code)
            errors.append(error)
        return torch.cat(codes), torch.cat(errors)

    def _weighted(self, error: Tensor) -> Tensor:
        """[rows] sum over columns and levels of lambda_r error²."""
        weights = torch.tensor(self.nest.weights, device=error.device)
        return torch.einsum("clr,l->r", error.square(), weights)


def _subtract(target: Tensor, matrix: Tensor, x: Tensor) -> None:
    """target [m, levels, rows] -= matrix [m, n] times x [n, levels, rows], in place."""
    target.flatten(1).addmm_(matrix, x.flatten(1), alpha=-1)


def _pad_rows(x: Tensor) -> Tensor:
    """[rows, n] with the first row repeated until `LANES` divides the number of rows."""
    return torch.cat([x, x[:1].expand(-len(x) % LANES, -1)])
