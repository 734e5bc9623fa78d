"""GPTQ of llm-compressor at one width per run, judged by `evaluate_dense`.

    python llmcompressor_gptq.py MODEL_DIR --bits 2 3 4 --json results.json
    python llmcompressor_gptq.py MODEL_DIR --bits 2 3 4 --asymmetric --json results.json

The library's defaults stay: min-max observer, static activation order, damping 0.01, block of 128 columns. It runs in
float32, because float16 matrix products are several times slower on a CPU without float16 instructions. The weights
judged are decoded from the codes with the scales rounded to float16, as they would be stored, and must agree with the
weights that the library's own forward pass multiplies with.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, fake_quantize
from datasets import Dataset
from evaluate_dense import (
    calibration_arguments,
    decoder_linears,
    finish,
    measure,
    read_windows,
)
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PEER = "llmcompressor"


def quantize(
    model_dir: Path, windows: torch.Tensor, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> nn.Module:
    """Run the library's one-shot GPTQ over all decoder matrices; the model returned holds its quantized weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    weights = QuantizationArgs(
        num_bits=bits, strategy=QuantizationStrategy.GROUP, group_size=group_size, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_dir),
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=windows.shape[1],
        num_calibration_samples=windows.shape[0],
    )
    return model


def quantized_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What every matrix decodes to with float16 scales. Raises ValueError if the library's forward uses others."""
    out = {}
    for name, linear in decoder_linears(model).items():
        scheme = getattr(linear, "quantization_scheme", None)
        if scheme is None:
            raise ValueError(f"{name}: llm-compressor left this matrix alone")
        weight = linear.weight.detach().float()
        out[name] = fake_quantize(
            x=weight,
            scale=linear.weight_scale.half().float(),
            zero_point=getattr(linear, "weight_zero_point", None),
            args=scheme.weights,
        )
        gap = ((out[name] - weight).norm() / weight.norm()).item()
        if gap > 1e-3:
            raise ValueError(f"{name}: decoding with float16 scales moves the weight by {gap:.1e} of its norm")
    return out


def run(args: Any, bits: int) -> None:
    """Quantize at one width, judge, save."""
    dtype = getattr(torch, args.dtype)
    windows = read_windows(args.model_dir, args.calibration, args.num_samples, args.seq_len)
    with measure() as meter:
        model = quantize(args.model_dir, windows, bits, args.group_size, not args.asymmetric, dtype)
    row = {
        "peer": PEER,
        "version": version(PEER),
        "variant": "asymmetric" if args.asymmetric else "symmetric",
        "bits": bits,
        "bits_per_weight": bits + (16 + bits * args.asymmetric) / args.group_size,
        "group_size": args.group_size,
        **meter.fields(),
    }
    weights = quantized_weights(model)
    del model
    finish(args, [(row, weights)])


def main() -> None:
    """Read the arguments, run every width."""
    parser = calibration_arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--dtype", default="float32", help="type that the library loads and quantizes the model in")
    args = parser.parse_args()
    for bits in args.bits:
        run(args, bits)


if __name__ == "__main__":
    main()
