"""MatGPTQ (arXiv 2602.03537): one 8-bit file of which every level is read by slicing; an independent reimplementation.

    python matgptq.py MODEL_DIR --bits 2 3 4 6 8 --json results.json

Written from the behaviour of the authors' program (IST-DASLab/MatGPTQ, commit 0e5bd93, symmetric, no activation order,
as in their script) so that it runs on a CPU; it holds none of their code. What that behaviour is:

- One scale per group, (max - min) / 255, symmetric with the zero point fixed at 128. The group is fitted when its first
  column is reached, from weights that carry the errors of earlier *blocks* of 128 columns but not those of earlier
  columns of the same block.
- Level r of a code is the code rounded to its r leading bits, half up, clamped to 2^r - 1 and shifted back: all levels
  share scale and zero point. (`--slices truncated` drops the low bits instead, which is not what the authors do.)
- A column takes the code of least sum over levels of lambda_r (w - level r)^2. The error fed forward is w minus the
  plain mean of the levels, whatever the lambdas.
- Statistics are those of the block's inputs with all earlier blocks quantized at the highest level; the seven matrices
  of a block are calibrated together, before any of them is quantized.

The best code as a function of w is a staircase: the cost of a code, less what all codes share, is a line in w, so the
choice is the lower envelope of 256 lines, computed once and looked up by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate_dense import (
    calibration_arguments,
    decoder_linears,
    finish,
    load_dense,
    measure,
    read_windows,
)
from torch import nn

PEER = "matgptq"
PARENT_BITS = 8
ORIGIN = "reimplementation of 0e5bd93"


@dataclass(frozen=True)
class Slices:
    """What each of the 256 codes is worth at each level, in steps of the parent scale: `values` [levels, 256]."""

    bits: tuple[int, ...]
    values: torch.Tensor

    @classmethod
    def make(cls, bits: Sequence[int], rounded: bool) -> Slices:
        """The table for rounded (the authors') or truncated slices."""
        codes = torch.arange(2**PARENT_BITS)
        rows = []
        for level in bits:
            drop = PARENT_BITS - level
            half = (1 << drop >> 1) if rounded else 0
            rows.append(((codes + half) >> drop).clamp(max=2**level - 1) << drop)
        return cls(tuple(bits), torch.stack(rows).float())


@dataclass(frozen=True)
class Staircase:
    """The code of least cost for a weight in steps of the parent scale: codes[bisect(edges, weight)]."""

    edges: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def make(cls, slices: Slices, lambdas: Sequence[float]) -> Staircase:
        """Lower envelope of the lines A[c] - 2 u B[c], A and B the weighted sums of squares and of values of code c."""
        weight = torch.tensor(lambdas, dtype=torch.float64)[:, None]
        values = slices.values.double()
        square, plain = (weight * values**2).sum(0).tolist(), (weight * values).sum(0).tolist()
        best: dict[float, int] = {}
        for code in range(len(plain)):
            if plain[code] not in best or square[code] < square[best[plain[code]]]:
                best[plain[code]] = code
        hull: list[int] = []
        edges: list[float] = []
        for slope in sorted(best):
            code = best[slope]
            while hull:
                edge = (square[code] - square[hull[-1]]) / (2 * (slope - plain[hull[-1]]))
                if not edges or edge > edges[-1]:
                    break
                hull.pop()
                edges.pop()
            if hull:
                edges.append((square[code] - square[hull[-1]]) / (2 * (slope - plain[hull[-1]])))
            hull.append(code)
        return cls(torch.tensor(edges, dtype=torch.float32), torch.tensor(hull))

    def __call__(self, steps: torch.Tensor) -> torch.Tensor:
        """Codes of weights given in steps of the scale, zero point included."""
        return self.codes[torch.bucketize(steps, self.edges)]


@dataclass(frozen=True)
class NestedMatrix:
    """One matrix of the file: codes [out, in], scale and zero_point [out, groups]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def dense(self, slices: Slices, level: int, scale_dtype: torch.dtype = torch.float16) -> torch.Tensor:
        """The weights [out, in] read at `level`, with scales of the stored type."""
        out_features, groups = self.scale.shape
        steps = slices.values[slices.bits.index(level)][self.codes.long()].reshape(out_features, groups, -1)
        scale = self.scale.to(scale_dtype).float()[..., None]
        return (scale * (steps - self.zero_point[..., None])).reshape(out_features, -1)


def fit_group(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Min-max scale and zero point [out] of the columns of one group."""
    low, high = weight.amin(1), weight.amax(1)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = -high
    empty = low == high
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale = (high - low) / (2**PARENT_BITS - 1)
    if symmetric:
        return scale, torch.full_like(scale, 2.0 ** (PARENT_BITS - 1))
    return scale, torch.round(-low / scale)


def inverse_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper Cholesky factor of the inverse of the damped Hessian, and the mask of channels that saw only zeros."""
    dead = hessian.diagonal() == 0
    damped = hessian + torch.diag(dead.float())
    damped = damped + damp * damped.diagonal().mean() * torch.eye(len(damped))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True), dead


def quantize_matrix(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    slices: Slices,
    staircase: Staircase,
    group_size: int,
    symmetric: bool = True,
    damp: float = 0.01,
    block_size: int = 128,
) -> NestedMatrix:
    """Codes of one matrix [out, in] from the Hessian [in, in] of its inputs."""
    factor, dead = inverse_factor(hessian, damp)
    work = weight.float().masked_fill(dead, 0.0)
    columns = work.shape[1]
    mean_value = slices.values.mean(0)
    codes = torch.empty_like(work, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = work[:, start:stop].clone()
        errors = torch.zeros_like(block)
        for column in range(start, stop):
            if column % group_size == 0:
                scale, zero = fit_group(work[:, column : column + group_size], symmetric)
                scales.append(scale)
                zeros.append(zero)
            here = column - start
            code = staircase(block[:, here] / scale + zero)
            codes[:, column] = code.to(torch.uint8)
            error = (block[:, here] - scale * (mean_value[code] - zero)) / factor[column, column]
            block[:, here:] -= error[:, None] * factor[column, column:stop]
            errors[:, here] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return NestedMatrix(codes, torch.stack(scales, 1), torch.stack(zeros, 1))


class _Stop(Exception):
    """Raised once the inputs of the first block are known."""


@torch.inference_mode()
def block_inputs(model: nn.Module, windows: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Hidden states before the first block, one per window, and the keyword arguments that every block receives."""
    states: list[torch.Tensor] = []
    shared: dict[str, Any] = {}

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        shared.update(kwargs)
        raise _Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in windows:
        try:
            model(input_ids=ids[None], use_cache=False)
        except _Stop:
            continue
    handle.remove()
    return states, shared


def run_block(block: nn.Module, state: torch.Tensor, shared: Mapping[str, Any]) -> torch.Tensor:
    """Hidden states after a block."""
    out = block(state, **shared)
    return out[0] if isinstance(out, tuple) else out


def collect_hessians(
    block: nn.Module, states: Sequence[torch.Tensor], shared: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Sum of x x^T for the inputs of every matrix of a block; matrices that read one tensor share the sum."""
    sums: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}
    handles = []

    def listen(name: str) -> Any:
        def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tensor = args[0]
            if id(tensor) not in seen:
                rows = tensor.reshape(-1, tensor.shape[-1]).float()
                seen[id(tensor)] = rows.T @ rows
                alive.append(tensor)
            sums[name] = sums[name] + seen[id(tensor)] if name in sums else seen[id(tensor)]

        return add

    for name, linear in decoder_linears(block).items():
        handles.append(linear.register_forward_pre_hook(listen(name)))
    for state in states:
        alive: list[torch.Tensor] = []
        seen.clear()
        run_block(block, state, shared)
    for handle in handles:
        handle.remove()
    return sums


@torch.inference_mode()
def quantize_model(
    model: nn.Module, windows: torch.Tensor, slices: Slices, lambdas: Sequence[float], group_size: int, symmetric: bool
) -> dict[str, NestedMatrix]:
    """Quantize all decoder matrices block by block; `model` ends with the weights of the highest level."""
    staircase = Staircase.make(slices, lambdas)
    states, shared = block_inputs(model, windows)
    file: dict[str, NestedMatrix] = {}
    for number, block in enumerate(model.model.layers):
        hessians = collect_hessians(block, states, shared)
        for name, linear in decoder_linears(block).items():
            matrix = quantize_matrix(linear.weight, hessians[name], slices, staircase, group_size, symmetric)
            linear.weight.copy_(matrix.dense(slices, max(slices.bits)))
            file[f"model.layers.{number}.{name}"] = matrix
        states = [run_block(block, state, shared) for state in states]
        print(f"block {number} done", flush=True)
    return file


def main() -> None:
    """Quantize once, judge every level."""
    parser = calibration_arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6, 8], help="levels of the one file")
    parser.add_argument("--lambdas", type=float, nargs="+", help="weight of each level's error; default equal")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--slices", choices=["rounded", "truncated"], default="rounded")
    parser.add_argument("--save-codes", type=Path, help="file to save codes and scales to, for comparison")
    args = parser.parse_args()
    lambdas = args.lambdas or [1.0] * len(args.bits)
    if max(args.bits) != PARENT_BITS or len(lambdas) != len(args.bits):
        parser.error(f"--bits {args.bits} must contain {PARENT_BITS} and match --lambdas {lambdas} in number")
    slices = Slices.make(args.bits, args.slices == "rounded")
    windows = read_windows(args.model_dir, args.calibration, args.num_samples, args.seq_len)
    with measure() as meter:
        file = quantize_model(
            load_dense(args.model_dir), windows, slices, lambdas, args.group_size, not args.asymmetric
        )
    if args.save_codes:
        torch.save({name: vars(matrix) for name, matrix in file.items()}, args.save_codes)
    row = {
        "peer": PEER,
        "version": ORIGIN,
        "variant": f"{'asymmetric' if args.asymmetric else 'symmetric'}, {args.slices} slices",
        "group_size": args.group_size,
        **meter.fields(),
    }
    results = []
    for level in args.bits:
        bits_per_weight = level + (16 + PARENT_BITS * args.asymmetric) / args.group_size
        fields = {**row, "bits": level, "bits_per_weight": bits_per_weight}
        results.append((fields, {name: matrix.dense(slices, level) for name, matrix in file.items()}))
    finish(args, results)


if __name__ == "__main__":
    main()
