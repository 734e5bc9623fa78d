"""Weights as the blocks of GGUF: scales fitted, codes chosen, bits put where llama.cpp looks for them.

All types store a row in blocks of 32 or 256 weights. `affine` types say value = scale * code - minimum, the others
value = scale * (code - middle). The K types cut a block into runs whose scales (and minima) are small integers times
one or two half-precision numbers of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 21
"""Weights fitted at a time."""


@dataclass(frozen=True)
class BlockType:
    """One way to store a row of weights.

    block: weights in a block; num_bytes: their bytes. run: weights that share a scale. bits: of a code.
    affine: there are minima. scale_bits: of the integer scales of a K type, 0 where scales are half precision.
    fallback: the type for rows that `block` does not divide.
    """

    name: str
    block: int
    num_bytes: int
    run: int
    bits: int
    affine: bool
    scale_bits: int
    pack: Callable[..., Tensor]
    fallback: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.block


def encode(kind: BlockType, values: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """uint8 [rows, bytes] of `values` float32 [rows, columns]; `kind.block` divides the columns.

    scale, offset [rows, columns / run]: of a grid (value = scale * code + offset) that the values are known to lie on;
    only for affine types. Without it the grid is searched.
    """
    rows, columns = values.shape
    known = None
    if scale is not None and offset is not None and kind.affine:
        known = torch.stack((scale, offset), dim=-1).reshape(-1, kind.block // kind.run, 2)
    blocks = values.reshape(-1, kind.block)
    step = max(1, _CHUNK // kind.block)
    packed = [
        _encode_blocks(kind, blocks[i : i + step], None if known is None else known[i : i + step])
        for i in range(0, len(blocks), step)
    ]
    return torch.cat(packed).reshape(rows, columns // kind.block * kind.num_bytes)


def _encode_blocks(kind: BlockType, values: Tensor, known: Tensor | None) -> Tensor:
    x = values.reshape(len(values), -1, kind.run)
    if kind.affine:
        scale, offset = _fit_affine(x, 2**kind.bits - 1, not kind.scale_bits) if known is None else known.unbind(-1)
        if not kind.scale_bits:
            scale, offset = _half(scale), _half(offset)
            codes = _round(x, scale, offset, 0, 2**kind.bits - 1)
            return kind.pack(codes.flatten(1), scale, offset)
        return kind.pack(*_fit_super_affine(kind, x, scale.clamp(min=0), (-offset).clamp(min=0)))
    half = 2 ** (kind.bits - 1)
    low = 1 - half if kind.bits == 8 else -half
    scale = _fit_symmetric(x, low, half - 1)
    if not kind.scale_bits:
        scale = _half(scale)
        return kind.pack((_round(x, scale, torch.zeros_like(scale), low, half - 1)).flatten(1), scale)
    return kind.pack(*_fit_super_symmetric(kind, x, scale))


def _round(x: Tensor, scale: Tensor, offset: Tensor, low: int, high: int) -> Tensor:
    """Codes float32 [n, runs, run] nearest to `x` for scale and offset [n, runs]."""
    inverse = torch.where(scale == 0, 0, 1 / scale)
    return ((x - offset.unsqueeze(-1)) * inverse.unsqueeze(-1)).round_().clamp_(low, high)


def _error(x: Tensor, scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
    """Squared error [n, runs]."""
    return (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1) - x).square_().sum(-1)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).half().float()


def _fit_affine(x: Tensor, top: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset [n, runs] of least squared error over a range of starts; offset at most 0 unless signed."""
    low, high = x.amin(-1), x.amax(-1)
    if not signed:
        low, high = low.clamp(max=0), high.clamp(min=0)
    best_scale, best_offset = (high - low) / top, low
    best = _error(x, best_scale, best_offset, _round(x, best_scale, best_offset, 0, top))
    sum_x, count = x.sum(-1), x.shape[-1]
    for extra in torch.linspace(-1.0, 1.0, 15) * min(1.0, top / 4):
        codes = _round(x, (high - low) / (top + float(extra)), low, 0, top)
        sum_q, sum_qq, sum_qx = codes.sum(-1), codes.square().sum(-1), (codes * x).sum(-1)
        spread = count * sum_qq - sum_q.square()
        scale = torch.where(spread > 0, (count * sum_qx - sum_q * sum_x) / spread, 0)
        offset = (sum_x - scale * sum_q) / count
        if not signed:
            above = offset > 0
            offset = torch.where(above, 0, offset)
            scale = torch.where(above & (sum_qq > 0), sum_qx / sum_qq, scale)
        error = _error(x, scale, offset, _round(x, scale, offset, 0, top))
        better = (error < best) & (scale > 0)
        best = torch.where(better, error, best)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _fit_symmetric(x: Tensor, low: int, high: int) -> Tensor:
    """Scale [n, runs] of least squared error; negative where the largest weight needs the longer side of the range."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    none = torch.zeros_like(extreme)
    best, best_scale = torch.full_like(extreme, -1.0), none
    starts = torch.linspace(-0.9, 0.9, 19).tolist()
    for limit in [low + extra for extra in starts] + ([-low + extra for extra in starts] if high + low else []):
        codes = _round(x, extreme / limit, none, low, high)
        sum_qx, sum_qq = (codes * x).sum(-1), codes.square().sum(-1)
        gain = torch.where(sum_qq > 0, sum_qx.square() / sum_qq, 0)
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better & (sum_qq > 0), sum_qx / sum_qq, best_scale)
    return best_scale


def _divide(wanted: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Half-precision unit [n] and integers [n, runs] whose products come nearest to `wanted` [n, runs]."""
    extreme = wanted.gather(-1, wanted.abs().argmax(-1, keepdim=True))
    limit = low if -low > high else high
    best = torch.full_like(extreme, torch.inf)
    best_unit, best_integers = extreme, wanted
    for shrink in torch.linspace(0.0, 1.0, 12).tolist():
        unit = _half(extreme / (limit - shrink * (1 if limit > 0 else -1)))
        integers = torch.where(unit == 0, 0, wanted / unit).round().clamp(low, high)
        error = (integers * unit - wanted).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_unit, best_integers = torch.where(better, unit, best_unit), torch.where(better, integers, best_integers)
    return best_unit.squeeze(-1), best_integers


def _fit_super_affine(
    kind: BlockType, x: Tensor, scale: Tensor, minimum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes [n, block], integer scales [n, runs], integer minima, unit of the scales [n], unit of the minima)."""
    top, most = 2**kind.bits - 1, 2**kind.scale_bits - 1
    unit, scales = _divide(scale, 0, most)
    low_unit, minima = _divide(minimum, 0, most)
    for _ in range(2):
        scales, minima = _best_integers(x, scales, minima, unit, low_unit, top, most)
        codes = _round(x, scales * unit[:, None], -minima * low_unit[:, None], 0, top)
        unit, low_unit = _refit_units(x, codes, scales, minima, unit, low_unit, top)
    codes = _round(x, scales * unit[:, None], -minima * low_unit[:, None], 0, top)
    return codes.flatten(1), scales, minima, unit, low_unit


def _best_integers(
    x: Tensor, scales: Tensor, minima: Tensor, unit: Tensor, low_unit: Tensor, top: int, most: int
) -> tuple[Tensor, Tensor]:
    """Integer scale and minimum of each run, at most one step from the given ones, of least error."""
    best = torch.full_like(scales, torch.inf)
    result = (scales, minima)
    for up in (0, -1, 1):
        for low_up in (0, -1, 1):
            tried = (scales + up).clamp(0, most), (minima + low_up).clamp(0, most)
            scale, offset = tried[0] * unit[:, None], -tried[1] * low_unit[:, None]
            error = _error(x, scale, offset, _round(x, scale, offset, 0, top))
            better = error < best
            best = torch.where(better, error, best)
            result = torch.where(better, tried[0], result[0]), torch.where(better, tried[1], result[1])
    return result


def _refit_units(
    x: Tensor, codes: Tensor, scales: Tensor, minima: Tensor, unit: Tensor, low_unit: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Both units by least squares for fixed integers, kept only where the error falls."""
    a, b = (codes * scales.unsqueeze(-1)).flatten(1), -minima.unsqueeze(-1).expand_as(x).flatten(1)
    target = x.flatten(1)
    aa, ab, bb = (a * a).sum(-1), (a * b).sum(-1), (b * b).sum(-1)
    ax, bx = (a * target).sum(-1), (b * target).sum(-1)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    new = torch.where(solvable, (ax * bb - bx * ab) / determinant, torch.where(aa > 0, ax / aa, unit))
    low_new = torch.where(solvable, (aa * bx - ab * ax) / determinant, low_unit)
    new, low_new = _half(new), _half(low_new)
    before = _error(x, scales * unit[:, None], -minima * low_unit[:, None], codes).sum(-1)
    scale, offset = scales * new[:, None], -minima * low_new[:, None]
    after = _error(x, scale, offset, _round(x, scale, offset, 0, top)).sum(-1)
    better = (after < before) & (new > 0) & (low_new >= 0)
    return torch.where(better, new, unit), torch.where(better, low_new, low_unit)


def _fit_super_symmetric(kind: BlockType, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [n, block] around 0, integer scales [n, runs], their unit [n])."""
    half, most = 2 ** (kind.bits - 1), 2 ** (kind.scale_bits - 1)
    none = torch.zeros_like(scale)
    unit, scales = _divide(scale, -most, most - 1)
    for _ in range(2):
        best, chosen = torch.full_like(scales, torch.inf), scales
        for up in (0, -1, 1):
            tried = (scales + up).clamp(-most, most - 1)
            step = tried * unit[:, None]
            error = _error(x, step, none, _round(x, step, none, -half, half - 1))
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, tried, chosen)
        scales = chosen
        a = (_round(x, scales * unit[:, None], none, -half, half - 1) * scales.unsqueeze(-1)).flatten(1)
        new = _half(torch.where(a.any(-1), (a * x.flatten(1)).sum(-1) / a.square().sum(-1), unit))
        step = scales * new[:, None]
        after = _error(x, step, none, _round(x, step, none, -half, half - 1)).sum(-1)
        unit = torch.where(after < best.sum(-1), new, unit)
    codes = _round(x, scales * unit[:, None], none, -half, half - 1)
    return codes.flatten(1), scales, unit


def _bytes(*parts: Tensor) -> Tensor:
    """Parts side by side: integers as bytes, floats as half precision."""
    as_bytes = [
        part.half().contiguous().view(torch.uint8).reshape(len(part), -1)
        if part.is_floating_point()
        else part.to(torch.uint8).reshape(len(part), -1)
        for part in parts
    ]
    return torch.cat(as_bytes, dim=1)


def _pack_q8_0(codes: Tensor, scale: Tensor) -> Tensor:
    return _bytes(scale, codes.to(torch.int8).view(torch.uint8))


def _nibbles(codes: Tensor) -> Tensor:
    """Low nibbles are the first half of every row, high ones the second."""
    low, high = (codes.int() & 15).chunk(2, dim=-1)
    return low | high << 4


def _fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of 32 codes as four bytes."""
    bits = (codes.int() >> 4 & 1).reshape(len(codes), 4, 8)
    return (bits << torch.arange(8)).sum(-1)


def _pack_q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    return _bytes(scale, _nibbles(codes + 8))


def _pack_q4_1(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return _bytes(scale, offset, _nibbles(codes))


def _pack_q5_0(codes: Tensor, scale: Tensor) -> Tensor:
    return _bytes(scale, _fifth_bits(codes + 16), _nibbles(codes + 16))


def _pack_q5_1(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return _bytes(scale, offset, _fifth_bits(codes), _nibbles(codes))


def _two_bits(codes: Tensor) -> Tensor:
    """[n, 64]: in each half of the block, bits 2 j of byte l are code 32 j + l."""
    quads = (codes.int() & 3).reshape(len(codes), 2, 4, 32)
    return (quads << (2 * torch.arange(4)).view(4, 1)).sum(2)


def _pack_q2_k(codes: Tensor, scales: Tensor, minima: Tensor, unit: Tensor, low_unit: Tensor) -> Tensor:
    return _bytes(scales.int() | minima.int() << 4, _two_bits(codes), unit, low_unit)


def _pack_q3_k(codes: Tensor, scales: Tensor, unit: Tensor) -> Tensor:
    codes, sixes = codes.int() + 4, scales.int() + 32
    high = ((codes >> 2).reshape(-1, 8, 32) << torch.arange(8).view(8, 1)).sum(1)
    low = sixes[:, :8] & 15 | (sixes[:, 8:] & 15) << 4
    top = ((sixes >> 4).reshape(-1, 4, 4) << (2 * torch.arange(4)).view(4, 1)).sum(1)
    return _bytes(high, _two_bits(codes), low, top, unit)


def _six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Twelve bytes of eight scales and eight minima."""
    s, m = scales.int(), minima.int()
    first = s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6
    return torch.cat((*first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4), 1)


def _pack_q4_k(codes: Tensor, scales: Tensor, minima: Tensor, unit: Tensor, low_unit: Tensor) -> Tensor:
    return _bytes(unit, low_unit, _six_bit_pairs(scales, minima), _nibbles(codes.reshape(-1, 4, 64)))


def _pack_q5_k(codes: Tensor, scales: Tensor, minima: Tensor, unit: Tensor, low_unit: Tensor) -> Tensor:
    high = ((codes.int() >> 4).reshape(-1, 8, 32) << torch.arange(8).view(8, 1)).sum(1)
    return _bytes(unit, low_unit, _six_bit_pairs(scales, minima), high, _nibbles(codes.reshape(-1, 4, 64)))


def _pack_q6_k(codes: Tensor, scales: Tensor, unit: Tensor) -> Tensor:
    quarters = (codes.int() + 32).reshape(-1, 2, 4, 32)
    low = torch.cat((quarters[:, :, 0] & 15 | (quarters[:, :, 2] & 15) << 4,
                     quarters[:, :, 1] & 15 | (quarters[:, :, 3] & 15) << 4), dim=-1)  # fmt: skip
    high = ((quarters >> 4) << (2 * torch.arange(4)).view(4, 1)).sum(2)
    return _bytes(low, high, scales.to(torch.int8).view(torch.uint8), unit)


BLOCK_TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q8_0", 32, 34, 32, 8, False, 0, _pack_q8_0),
        BlockType("Q4_0", 32, 18, 32, 4, False, 0, _pack_q4_0),
        BlockType("Q4_1", 32, 20, 32, 4, True, 0, _pack_q4_1),
        BlockType("Q5_0", 32, 22, 32, 5, False, 0, _pack_q5_0),
        BlockType("Q5_1", 32, 24, 32, 5, True, 0, _pack_q5_1),
        BlockType("Q2_K", 256, 84, 16, 2, True, 4, _pack_q2_k, "Q4_1"),
        BlockType("Q3_K", 256, 110, 16, 3, False, 6, _pack_q3_k, "Q4_1"),
        BlockType("Q4_K", 256, 144, 32, 4, True, 6, _pack_q4_k, "Q4_1"),
        BlockType("Q5_K", 256, 176, 32, 5, True, 6, _pack_q5_k, "Q5_1"),
        BlockType("Q6_K", 256, 210, 16, 6, False, 8, _pack_q6_k, "Q8_0"),
    )
}
