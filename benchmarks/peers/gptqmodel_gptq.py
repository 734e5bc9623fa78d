"""GPTQ of GPTQModel at one width per run, judged by `evaluate_dense`.

    python gptqmodel_gptq.py MODEL_DIR --bits 4 --json results.json

The library's defaults stay: symmetric, no descending order of activations but its activation-aware order of groups,
damping 0.05. Packing through its C++ extension, which it compiles at run time, is switched off: pure Python packs the
same codes. The weights judged are those that its packed layers decode to.
"""

from __future__ import annotations

import os
from importlib.metadata import version
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

# Without the first the library refuses machines of one or two cores: its thread pool gives the CPU (cores + 1) // 2
# workers and its loader asks for two of them.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

PEER = "gptqmodel"


def quantize(model_dir: Path, windows: torch.Tensor, config: Any, dtype: torch.dtype) -> nn.Module:
    """Run the library over all decoder matrices; the model returned holds its packed layers."""
    model = GPTQModel.load(str(model_dir), config, device="cpu", dtype=dtype, backend=BACKEND.GPTQ_TORCH)
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows]
    model.quantize(rows, batch_size=1, calibration_sort=None, backend=BACKEND.GPTQ_TORCH)
    return model.model


def packed_layers(model: nn.Module, names: set[str]) -> dict[str, nn.Module]:
    """The packed layers by name. Raises ValueError if one of `names` was left alone."""
    layers = {name: module for name, module in model.named_modules() if name in names}
    for name in sorted(names):
        if not hasattr(layers.get(name), "dequantize_weight"):
            raise ValueError(f"{name}: left as {type(layers.get(name)).__name__}, not quantized")
    return layers


def counted_bits(layers: dict[str, nn.Module], count: int, group_size: int) -> float:
    """Bits per weight of codes and zero points as packed and of scales at 16 bits each.

    The index of every channel's group is stored too, but counted only where it says more than channel // group_size.
    """
    bits = 0
    for layer in layers.values():
        bits += sum(8 * tensor.numel() * tensor.element_size() for tensor in (layer.qweight, layer.qzeros))
        bits += 16 * layer.scales.numel()
        if not torch.equal(layer.g_idx.cpu().int(), torch.arange(layer.in_features, dtype=torch.int32) // group_size):
            bits += 8 * layer.g_idx.numel() * layer.g_idx.element_size()
    return bits / count


def run(args: Any, bits: int) -> None:
    """Quantize at one width, judge, save."""
    windows = read_windows(args.model_dir, args.calibration, args.num_samples, args.seq_len)
    shapes = {name: linear.weight.shape for name, linear in decoder_linears(load_dense(args.model_dir)).items()}
    # By default it writes finished layers to disk and leaves empty ones behind, from which nothing can be decoded.
    config = QuantizeConfig(bits=bits, group_size=args.group_size, offload_to_disk=False)
    with measure() as meter:
        model = quantize(args.model_dir, windows, config, getattr(torch, args.dtype))
    layers = packed_layers(model, set(shapes))
    row = {
        "peer": PEER,
        "version": version(PEER),
        "variant": "symmetric" if config.sym else "asymmetric",
        "bits": bits,
        "bits_per_weight": counted_bits(layers, sum(shape.numel() for shape in shapes.values()), args.group_size),
        "group_size": args.group_size,
        **meter.fields(),
    }
    weights = {}
    for name, layer in layers.items():
        layer.scales = layer.scales.half().float()
        weights[name] = type(layer).dequantize_weight(layer).detach().clone().T.float()
    finish(args, [(row, weights)])


def main() -> None:
    """Read the arguments, run every width."""
    parser = calibration_arguments(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--dtype", default="float32", help="type that the library loads and quantizes the model in")
    args = parser.parse_args()
    for bits in args.bits:
        run(args, bits)


if __name__ == "__main__":
    main()
