"""AutoRound at one width for all matrices, judged by `evaluate_dense`.

    python autoround_uniform.py MODEL_DIR --bits 2 3 4 --calibration a.txt --also b.txt c.txt --json rows.json

Asymmetric by default, as its authors advise below 4 bits. Several calibration texts share the windows equally. The
samples given are a little longer than a window, which the library cuts. The weights judged are those its quantized
layers hold.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from evaluate_dense import calibration_arguments, decoder_linears, finish, measure, read_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

PEER = "auto-round"


def write_samples(args: argparse.Namespace, path: Path) -> None:
    """Equal numbers of windows of every text as JSON lines; the library drops samples shorter than a window."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    texts = [args.calibration, *args.also]
    length, share = args.seq_len + args.seq_len // 8, -(-args.num_samples // len(texts))
    windows = torch.cat([read_windows(args.model_dir, text, share, length) for text in texts])
    path.write_text("".join(json.dumps({"text": tokenizer.decode(ids)}) + "\n" for ids in windows))


def run(args: argparse.Namespace, bits: int, samples: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Quantize; the row's fields and the decoded weights."""
    model = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=torch.float32)
    with measure() as meter:
        tool = AutoRound(
            model, AutoTokenizer.from_pretrained(args.model_dir), scheme=f"W{bits}A16G{args.group_size}",
            sym=args.symmetric, iters=args.iters, dataset=str(samples), nsamples=args.num_samples, seqlen=args.seq_len,
            batch_size=args.batch_size, device_map="cpu", enable_torch_compile=False,
        )  # fmt: skip
        quantized, config = tool.quantize()
    weights = {name: linear.weight.detach().clone().float() for name, linear in decoder_linears(quantized).items()}
    if any(int(config[name]["bits"]) != bits or bool(config[name]["sym"]) != args.symmetric for name in weights):
        raise ValueError(f"auto-round did not use {bits} bits, symmetric {args.symmetric}, for every matrix")
    scales = (16 if args.symmetric else 16 + bits) / args.group_size
    row = {
        "peer": PEER,
        "version": version(PEER),
        "variant": f"{'symmetric' if args.symmetric else 'asymmetric'}, {args.iters} steps of {args.batch_size}",
        "bits": bits,
        "bits_per_weight": bits + scales,
        "group_size": args.group_size,
        "iters": args.iters,
        "also": [text.name for text in args.also],
        **meter.fields(),
    }
    return row, weights


def main() -> None:
    """Read the arguments, run every width, judge all in one pass."""
    parser = calibration_arguments(__doc__)
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="further texts to calibrate on")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--symmetric", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples.jsonl"
        write_samples(args, samples)
        made = [run(args, bits, samples) for bits in args.bits]
    finish(args, made)


if __name__ == "__main__":
    main()
