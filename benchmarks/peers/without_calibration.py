"""bitsandbytes' NF4 and FP4, HQQ and optimum-quanto, which need no calibration text, judged by `evaluate_dense`.

    python without_calibration.py MODEL_DIR --windows 8 --json rows.json

Each library's own quantizer on each matrix, at its defaults, in groups of 64 where it has groups; the weights judged
are those it decodes. Bits per weight are counted from the arrays each library keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from bitsandbytes import functional
from evaluate_dense import common_arguments, decoder_linears, judge, load_dense, load_quantized, measure, save_rows
from hqq.core.quantize import Quantizer
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qfloat8_e4m3fn, qint2, qint4, qint8, quantize_weight

GROUP = 64
Decoded = tuple[torch.Tensor, int]
"""Weights as decoded, and the stored bits."""


def bits_in(*tensors: torch.Tensor | None) -> int:
    return sum(8 * tensor.nbytes for tensor in tensors if tensor is not None)


def bitsandbytes_4bit(weight: torch.Tensor, kind: str) -> Decoded:
    packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type=kind, compress_statistics=True)
    second = state.state2
    return functional.dequantize_4bit(packed, state), bits_in(packed, state.absmax, second.absmax)


def hqq(weight: torch.Tensor, bits: int) -> Decoded:
    packed, meta = Quantizer.quantize(
        weight, nbits=bits, channel_wise=True, group_size=GROUP, optimize=True, axis=1, device="cpu",
        compute_dtype=torch.float32, bitpack=False,
    )  # fmt: skip
    groups = weight.numel() // GROUP
    return Quantizer.dequantize(packed, meta).reshape(weight.shape), bits * weight.numel() + 2 * 16 * groups


def quanto(weight: torch.Tensor, kind: Any) -> Decoded:
    if kind in (qint2, qint4):
        scale, shift = MaxOptimizer()(weight, kind, 0, GROUP)
        held = quantize_weight(weight, kind, 0, scale, shift, GROUP)
        return held.dequantize(), kind.bits * weight.numel() + 16 * (scale.numel() + shift.numel())
    scale = AbsmaxOptimizer()(weight, kind, 0)
    return quantize_weight(weight, kind, 0, scale).dequantize(), 8 * weight.numel() + 16 * scale.numel()


def variants() -> Iterator[tuple[str, str, int, Callable[[torch.Tensor], Decoded]]]:
    """Library, variant, width, and what it makes of a matrix."""
    for kind in ("nf4", "fp4"):
        yield "bitsandbytes", kind, 4, lambda weight, kind=kind: bitsandbytes_4bit(weight, kind)
    for bits in (2, 3, 4, 8):
        yield "hqq", "axis 1", bits, lambda weight, bits=bits: hqq(weight, bits)
    for number, bits in ((qint2, 2), (qint4, 4), (qint8, 8), (qfloat8_e4m3fn, 8)):
        yield "optimum-quanto", number.name, bits, lambda weight, number=number: quanto(weight, number)


@torch.no_grad()
def main() -> None:
    args = common_arguments(__doc__).parse_args()
    full = {name: linear.weight.float() for name, linear in decoder_linears(load_dense(args.model_dir)).items()}
    others = []
    for peer, variant, bits, quantize in variants():
        weights, stored = {}, 0
        error = energy = 0.0
        with measure() as meter:
            for name, weight in full.items():
                weights[name], count = quantize(weight)
                stored += count
                error += float((weights[name].double() - weight).square().sum())
                energy += float(weight.double().square().sum())
        row = {
            "peer": peer,
            "version": version(peer),
            "variant": variant,
            "bits": bits,
            "bits_per_weight": round(stored / sum(weight.numel() for weight in full.values()), 4),
            "weight_error": float(f"{error / energy:.6g}"),
            **meter.fields(),
        }
        others.append((row, load_quantized(args.model_dir, weights)))
    save_rows(args.json, judge(args.model_dir, others, args.texts, args.windows, args.seq_len))


if __name__ == "__main__":
    main()
