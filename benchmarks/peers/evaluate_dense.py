"""Judge one dense causal language model against another: perplexity, KL divergence and top-1 agreement.

Plain torch and transformers. It shares no line with elastiq's own evaluation, so that the two can check each other, and
it runs in every peer's environment, whatever versions that peer pins.

    python evaluate_dense.py FULL_MODEL_DIR OTHER_MODEL_DIR ... --texts a.txt b.txt --json scores.json
    python evaluate_dense.py FULL_MODEL_DIR --texts a.txt            # the full model alone

The scripts of this folder write such other models with --save DIR (weights decoded to float32, and row.json, the fields
of their rows); judging several in one call runs the full model once.

Protocol: a text file is tokenized as one string and cut from its beginning into windows of --seq-len tokens that do not
overlap, the first of them what the tokenizer puts in front of a text, where it does (at most one token); every window
gives seq_len - 1 predictions. Weights are read as stored and all
arithmetic is float32; the divergence is summed in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path("../shared/data")
CALIBRATION = DATA / "wikitext-2/train.txt"
TEXTS = (DATA / "wikitext-2/test.raw.txt", DATA / "books/heldout_20.txt")
KEY = ("peer", "variant", "model", "bits", "text")


@dataclass(frozen=True)
class Scores:
    """What one text says about a model: `kl_*` in nats per predicted position, against the full model."""

    perplexity: float
    full_perplexity: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    positions: int


def read_windows(model_dir: Path, text: Path, count: int, seq_len: int) -> torch.Tensor:
    """The first `count` windows of a text file as token ids [count, seq_len]. Raises ValueError if it is too short."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    content = text.read_text(encoding="utf-8")
    # A window of 512 tokens never needs more than 40 characters a token here; tokenizing the rest would be waste, and
    # the cut lies so far behind the last window that it cannot change a token inside.
    ids = tokenizer(content[: count * seq_len * 40 + 100_000], add_special_tokens=False, verbose=False)["input_ids"]
    plain, whole = (tokenizer("A text", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = whole[: whole.index(plain[0])]
    if len(start) > 1:
        raise ValueError(f"{model_dir}: a text begins with the tokens {start}; at most one is handled here")
    room = seq_len - len(start)
    if len(ids) < count * room:
        raise ValueError(f"{text}: {len(ids)} tokens, but {count} windows of {seq_len} need {count * room}")
    rows = torch.tensor(ids[: count * room]).reshape(count, room)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, len(start)), rows], dim=1)


def load_dense(model_dir: Path) -> nn.Module:
    """A causal language model from a folder, its stored weights cast to float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices that every peer quantizes: all linear layers but the output head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def load_quantized(model_dir: Path, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model of `model_dir` with all its decoder matrices replaced. Raises ValueError on a mismatch."""
    model = load_dense(model_dir)
    linears = decoder_linears(model)
    if linears.keys() != weights.keys():
        raise ValueError(f"matrices differ: {sorted(linears.keys() ^ weights.keys())[:4]} ...")
    for name, linear in linears.items():
        if linear.weight.shape != weights[name].shape:
            raise ValueError(f"{name}: weight {tuple(linear.weight.shape)} but given {tuple(weights[name].shape)}")
        linear.weight.data = weights[name].to(torch.float32).contiguous()
    return model


def most_values_per_group(weight: torch.Tensor, group_size: int) -> int:
    """The largest number of distinct values in any group of a row: at most 2**bits if the weight was quantized."""
    groups = weight.detach().float().reshape(-1, group_size).sort(dim=1).values
    return int((groups.diff(dim=1) != 0).sum(dim=1).max()) + 1


def check_quantized(weights: Mapping[str, torch.Tensor], bits: int, group_size: int) -> None:
    """Raises ValueError unless every group of every matrix holds at most 2**bits values: nothing full slips through."""
    for name, weight in weights.items():
        count = most_values_per_group(weight, group_size)
        if count > 2**bits:
            raise ValueError(f"{name}: a group of {group_size} holds {count} values, more than 2**{bits}")


def _divergence(full_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(full || other) for every position, in float64, a few positions at a time to bound memory."""
    parts = []
    for full_part, part in zip(full_logits.split(64), logits.split(64), strict=True):
        full_log = full_part.double().log_softmax(-1)
        parts.append((full_log.exp() * (full_log - part.double().log_softmax(-1))).sum(-1))
    return torch.cat(parts)


@dataclass
class _Sums:
    """What accumulates over the windows for one model."""

    nll: float
    kl: list[torch.Tensor]
    agree: list[torch.Tensor]


@torch.inference_mode()
def evaluate(full: nn.Module, others: Sequence[nn.Module], windows: torch.Tensor) -> list[Scores]:
    """Compare each of `others` with `full` over windows of token ids [count, seq_len]; the full model runs once."""
    full_nll, held = 0.0, [_Sums(0.0, [], []) for _ in others]
    for ids in windows:
        full_logits = full(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        full_nll += nn.functional.cross_entropy(full_logits, ids[1:], reduction="sum").item()
        for other, sums in zip(others, held, strict=True):
            logits = other(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            sums.nll += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            sums.kl.append(_divergence(full_logits, logits))
            sums.agree.append(full_logits.argmax(-1) == logits.argmax(-1))
    positions = windows.shape[0] * (windows.shape[1] - 1)
    return [_scores(sums, full_nll, positions) for sums in held]


def _scores(sums: _Sums, full_nll: float, positions: int) -> Scores:
    divergence = torch.cat(sums.kl)
    return Scores(
        perplexity=math.exp(min(sums.nll / positions, 700.0)),
        full_perplexity=math.exp(full_nll / positions),
        kl_mean=divergence.mean().item(),
        kl_p99=divergence.quantile(0.99).item(),
        kl_max=divergence.max().item(),
        top1_agreement=torch.cat(sums.agree).double().mean().item(),
        positions=positions,
    )


class Meter:
    """Cost of one piece of work: wall seconds, processor seconds of all threads, peak memory of the process so far."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0

    def fields(self) -> dict[str, float]:
        """The cost as a row's fields. On a shared machine the processor seconds are the ones to compare."""
        return {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "peak_mib": round(self.peak_mib),
        }


@contextmanager
def measure() -> Iterator[Meter]:
    """Time the body; the fields are filled in when it ends."""
    meter, begin, busy = Meter(), time.perf_counter(), time.process_time()
    yield meter
    meter.seconds = time.perf_counter() - begin
    meter.cpu_seconds = time.process_time() - busy
    meter.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def save_rows(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSON list, replacing those of the same peer, variant, model, bits and text; None prints only."""
    for row in rows:
        print(json.dumps(row), flush=True)
    if path is None:
        return
    held = json.loads(path.read_text()) if path.exists() else []
    fresh = {tuple(row.get(name) for name in KEY) for row in rows}
    held = [row for row in held if tuple(row.get(name) for name in KEY) not in fresh] + rows
    path.write_text(json.dumps(held, indent=1) + "\n")


def rounded(scores: Scores) -> dict[str, float | int]:
    """The scores as a row's fields, six significant digits each."""
    return {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in asdict(scores).items()}


def judge(
    model_dir: Path,
    others: Sequence[tuple[Mapping[str, Any], nn.Module]],
    texts: Sequence[Path],
    windows: int,
    seq_len: int,
) -> list[dict[str, Any]]:
    """One row per model and text: the fields given with the model, then the scores against `model_dir`."""
    full = load_dense(model_dir)
    rows = []
    for text in texts:
        ids = read_windows(model_dir, text, windows, seq_len)
        place = {"model": model_dir.resolve().name, "text": f"{text.parent.name}/{text.name}"}
        for (fields, _), scores in zip(others, evaluate(full, [other for _, other in others], ids), strict=True):
            rows.append({**fields, **place, **rounded(scores)})
    return rows


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every script of this folder takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, help="plain Hugging Face folder of the full model")
    parser.add_argument("--texts", type=Path, nargs="+", default=list(TEXTS), help="texts to evaluate on")
    parser.add_argument("--windows", type=int, default=24, help="windows of each text")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file of rows to add the results to")
    return parser


def calibration_arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a script that quantizes."""
    parser = common_arguments(description)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="text to calibrate on")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--save", type=Path, help="folder to save the quantized models in, one folder each")
    parser.add_argument("--skip-evaluation", action="store_true", help="quantize, report time and memory only")
    return parser


def finish(args: argparse.Namespace, results: Sequence[tuple[dict[str, Any], Mapping[str, torch.Tensor]]]) -> None:
    """Check, save, judge and record quantized weights, each given with the fields of its row."""
    others = []
    for row, weights in results:
        check_quantized(weights, row["bits"], row["group_size"])
        row["calibration"] = f"{args.calibration.parent.name}/{args.calibration.name}"
        others.append((row, load_quantized(args.model_dir, weights)))
        if args.save:
            name = f"{args.model_dir.resolve().name}-{row['peer']}-{row['variant']}-{row['bits']}"
            folder = args.save / name.replace(" ", "-").replace(",", "")
            others[-1][1].save_pretrained(folder)
            (folder / "row.json").write_text(json.dumps(row) + "\n")
    if args.skip_evaluation:
        rows = [{**row, "model": args.model_dir.resolve().name, "text": None} for row, _ in others]
    else:
        rows = judge(args.model_dir, others, args.texts, args.windows, args.seq_len)
    save_rows(args.json, rows)


def main() -> None:
    """Judge folders against another, or the full model alone."""
    parser = common_arguments(__doc__)
    parser.add_argument("other_dirs", type=Path, nargs="*", help="folders of the other models, in plain weights")
    args = parser.parse_args()
    with measure() as meter:
        others = []
        for folder in args.other_dirs:
            row = folder / "row.json"
            fields = json.loads(row.read_text()) if row.exists() else {"peer": folder.resolve().name}
            others.append((fields, load_dense(folder)))
        others = others or [({"peer": "full"}, load_dense(args.model_dir))]
        rows = judge(args.model_dir, others, args.texts, args.windows, args.seq_len)
    save_rows(args.json, rows)
    print(meter.fields())


if __name__ == "__main__":
    main()
