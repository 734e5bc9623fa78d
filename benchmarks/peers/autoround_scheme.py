"""AutoRound with widths chosen by its AutoScheme, judged by `evaluate_dense`.

    python autoround_scheme.py MODEL_DIR --bits-per-weight 2.75 3.25 3.75 4.25 --json rows.json

A mean width counted with scales and zero points, as the library counts it, chosen among 2, 3, 4 and 8 bits of one group
size. Its calibration text is given as samples a little longer than a window, which the library cuts. The
weights judged are those its quantized layers hold.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from evaluate_dense import (
    calibration_arguments,
    decoder_linears,
    judge,
    load_quantized,
    measure,
    most_values_per_group,
    read_windows,
    save_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

PEER = "auto-round"


def write_samples(args: Any, path: Path) -> None:
    """The calibration windows as the JSON lines the library reads; it drops samples shorter than a window."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    length = args.seq_len + args.seq_len // 8
    windows = read_windows(args.model_dir, args.calibration, args.num_samples, length)
    path.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in windows))


def run(args: Any, target: float, samples: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Choose widths, quantize; the row's fields and the decoded weights."""
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    options = tuple(f"W{bits}A16G{args.group_size}" for bits in (2, 3, 4, 8))
    scheme = AutoScheme(avg_bits=target, options=options, nsamples=args.num_samples, seqlen=args.seq_len,
                        dataset=str(samples), batch_size=1, enable_torch_compile=False)  # fmt: skip
    with measure() as meter:
        tool = AutoRound(
            model, AutoTokenizer.from_pretrained(args.model_dir), scheme=scheme, iters=args.iters, dataset=str(samples),
            nsamples=args.num_samples, seqlen=args.seq_len, batch_size=8, device_map="cpu", enable_torch_compile=False,
        )  # fmt: skip
        quantized, config = tool.quantize()
    weights = {name: linear.weight.detach().clone().float() for name, linear in decoder_linears(quantized).items()}
    widths = {name: int(config[name]["bits"]) for name in weights}
    for name, weight in weights.items():
        if most_values_per_group(weight, args.group_size) > 2 ** widths[name]:
            raise ValueError(f"{name}: more than 2**{widths[name]} values in a group")
    count = sum(weight.numel() for weight in weights.values())
    scales = 16 / args.group_size  # symmetric: zero points are known
    row = {
        "peer": PEER,
        "version": version(PEER),
        "variant": f"AutoScheme {target}",
        "bits": None,
        "bits_per_weight": sum(widths[name] * weight.numel() for name, weight in weights.items()) / count + scales,
        "widths": {str(bits): sum(width == bits for width in widths.values()) for bits in sorted(set(widths.values()))},
        "map": widths,
        "iters": args.iters,
        **meter.fields(),
    }
    return row, weights


def main() -> None:
    """Read the arguments, run every mean width, judge all in one pass."""
    parser = calibration_arguments(__doc__)
    parser.add_argument("--bits-per-weight", type=float, nargs="+", default=[2.75, 3.25, 3.75, 4.25])
    parser.add_argument("--iters", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        write_samples(args, samples)
        made = [run(args, target, samples) for target in args.bits_per_weight]
    others = [(row, load_quantized(args.model_dir, weights)) for row, weights in made]
    save_rows(args.json, judge(args.model_dir, others, args.texts, args.windows, args.seq_len))


if __name__ == "__main__":
    main()
