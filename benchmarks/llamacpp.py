"""GGUF exports in a real llama.cpp: perplexity there and here by its protocol, beside its own quantization.

    python benchmarks/llamacpp.py NESTED --programs DIR --text wikitext-2/test.raw.txt --chunks 100 --json rows.json
    python benchmarks/llamacpp.py NESTED --programs DIR --text FILE --model MODEL --calibration FILE   # beside its own

DIR holds llama-perplexity, llama-completion, llama-quantize and llama-imatrix. The protocol: windows of 512 tokens, the
last 255 predictions of each count; where the tokenizer puts a token in front of a text, it takes the place of every
window's first. "here" is what torch makes of the file's tensors as the package gguf decodes them,
with exact inputs and with inputs of every matrix rounded to eight bits, as llama.cpp's products on a CPU round them.
With --model, llama.cpp quantizes that 16-bit model to the same type (decoder matrices; the embedding stays 16 bits),
without and with an importance matrix of 32 windows of the calibration text.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from elastiq.checkpoint import CheckpointReader
from elastiq.foreign.exporting import GGUF, export
from elastiq.foreign.gguf.exporting import _add_tokenizer, _names, _plain
from elastiq.foreign.gguf.families import family_of
from elastiq.foreign.view import View
from elastiq.text import beginning, tokenize

TYPES = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q4_0": 4, "Q4_1": 4, "Q5_K": 5, "Q5_0": 5, "Q5_1": 5, "Q6_K": 6, "Q8_0": 8}
"""The width whose level is written as each type."""
WINDOW = 512
PROMPT = "The history of the"


def run(program: Path, *arguments: object, both: bool = True) -> str:
    """What a program of llama.cpp prints, with or without its log."""
    done = subprocess.run(
        [program, *map(str, arguments)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{program.name} stopped with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout + (done.stderr if both else "")


def continued(programs: Path, file: Path, prompt: str) -> str:
    """The prompt and 16 tokens after it, always the likeliest."""
    options = ["-n", 16, "--temp", 0, "-t", 2, "-no-cnv", "--ignore-eos"]
    return run(programs / "llama-completion", "-m", file, "-p", prompt, *options, both=False)


def there(programs: Path, file: Path, text: Path, chunks: int) -> float:
    """Perplexity as llama.cpp gives it."""
    said = ""
    for _ in range(8):  # one run in five of that of ggml 0.25.3 ended before its last lines are out
        said = run(programs / "llama-perplexity", "-m", file, "-f", text, "-c", WINDOW, "--chunks", chunks, "-t", 2)
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
        if found is not None:
            return float(found[1])
    raise SystemExit(f"llama-perplexity gave no estimate of {file}:\n{said[-2000:]}")


@torch.inference_mode()
def here(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Perplexity of windows [count, 512] by the same protocol."""
    first, total = WINDOW // 2, 0.0
    for window in ids:
        logits = model(input_ids=window[None], use_cache=False).logits[0, first:-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[first + 1 :], reduction="sum"))
    return math.exp(total / (len(ids) * (WINDOW - first - 1)))


def round_inputs(model: PreTrainedModel, file: Path, view: View) -> None:
    """From now on every matrix sees its input in eight bits and blocks of its type, as in llama.cpp's CPU products."""
    ours = {theirs: name for name, theirs in _names(view, family_of(view.config)).items()}
    for tensor in gguf.GGUFReader(file).tensors:
        name = ours.get(tensor.name)
        if name in view.matrices and view.matrices[name].role in ("linear", "conv1d"):
            block = 256 if tensor.tensor_type.name.endswith("_K") else 32
            model.get_submodule(name).register_forward_pre_hook(partial(_rounded, block))


def _rounded(block: int, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    blocks = inputs[0].unflatten(-1, (-1, block))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / step).round().mul(step).flatten(-2), *inputs[1:])


def read_windows(nested: Path, text: Path, chunks: int) -> torch.Tensor:
    """Token ids [chunks, 512] as llama-perplexity cuts them: the text with its beginning, and the first token of every
    window overwritten by it."""
    tokenizer = AutoTokenizer.from_pretrained(nested)
    start = beginning(tokenizer)
    if len(start) > 1:
        raise SystemExit(f"the tokenizer begins a text with {len(start)} tokens, llama-perplexity a window with one")
    ids = torch.tensor([*start, *tokenize(text.read_text(), tokenizer, str(text), start)])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:chunks].clone()
    windows[:, : len(start)] = torch.tensor(start, dtype=torch.long)
    return windows


def write_float(view: View, model: Path, path: Path) -> None:
    """The 16-bit original of a checkpoint as GGUF, with the metadata that its exports have."""
    family = family_of(view.config)
    names = _names(view, family)
    writer = gguf.GGUFWriter(path, family.architecture)
    family.describe(writer, view.config)
    _add_tokenizer(writer, view)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    arrays = {name: array for file in model.glob("*.safetensors") for name, array in load_file(file).items()}
    for name, theirs in names.items():
        full = f"{name}.weight" if name in view.matrices else name
        values = family.adapt(full, arrays[full].float(), view.config)
        if name in view.matrices and view.matrices[name].role == "conv1d":
            values = values.T.contiguous()
        writer.add_tensor(theirs, _plain(values, torch.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Read the arguments, write every type, run all of it, print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nested", type=Path)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--model", type=Path, help="16-bit original, to be quantized by llama.cpp")
    parser.add_argument("--calibration", type=Path, help="text for its importance matrix")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    view, windows = View(CheckpointReader(args.nested), None), read_windows(args.nested, args.text, args.chunks)
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        print(json.dumps(row), flush=True)
        rows.append(row)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        if args.model:
            write_float(view, args.model, room / "float.gguf")
            add(type="F16", theirs=there(args.programs, room / "float.gguf", args.text, len(windows)))
            calibration = ["-f", args.calibration, "-c", WINDOW, "--chunks", 32, "--no-ppl", "-t", 2]
            run(args.programs / "llama-imatrix", "-m", room / "float.gguf", *calibration, "-o", room / "imatrix.gguf")
        for kind in args.types:
            file = room / "ours.gguf"
            target = GGUF(kind)
            summary = export(args.nested, file, target, TYPES[kind])
            row = {"type": kind, "bits": TYPES[kind], "bits_per_weight": round(summary.bits_per_weight, 3)}
            row |= {"ours": there(args.programs, file, args.text, len(windows))}
            row |= {"continued": continued(args.programs, file, PROMPT)}
            same = View(view.reader, TYPES[kind])
            model = target.open(file, same)
            row |= {"ours_here": here(model, windows)}
            round_inputs(model, file, same)
            row |= {"ours_here_8bit_inputs": here(model, windows)}
            file.unlink()
            for key, importance in (("theirs", []), ("theirs_imatrix", ["--imatrix", room / "imatrix.gguf"])):
                if args.model:
                    keep = ["--token-embedding-type", "f16", "--output-tensor-type", "f16", "--pure"]
                    quantized = room / "theirs.gguf"
                    run(args.programs / "llama-quantize", *importance, *keep, room / "float.gguf", quantized, kind, 2)
                    row[key] = there(args.programs, quantized, args.text, len(windows))
            add(**row)


if __name__ == "__main__":
    main()
