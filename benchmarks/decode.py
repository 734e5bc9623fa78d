"""Whole models: tokens per second of elastiq at each width beside llama.cpp and transformers, in one run.

    python benchmarks/run.py decode --checkpoint NESTED --model DENSE --llama-bench llama-bench \
        --peer 8=Q8_0.gguf --peer 4=Q4_0.gguf --json rows.json

Every measurement is a process of its own, one after another in rounds, so that a slow minute of the machine falls on
all of them; a row is the median of its rounds. Logits are compared with the readable torch twin before any speed is
written. Peers that are absent are named and skipped.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoModelForCausalLM, DynamicCache

import elastiq
from elastiq.checkpoint import CheckpointReader
from elastiq.checkpoint.names import BASE, plane_file
from elastiq.evaluate import write_json
from elastiq.linalg import native
from elastiq.runtime import NestedEmbedding, bits_per_weight, bytes_in_memory, nested_matrices, token_way, with_cache

TOLERANCE = 2e-3
"""Relative difference of logits from the torch twin's, above which nothing is reported."""


def decode(
    checkpoint: Annotated[Path, typer.Option(help="Nested checkpoint.")],
    model: Annotated[Path | None, typer.Option(help="The dense model, to run in transformers in bfloat16.")] = None,
    bits: Annotated[str, typer.Option(help="Widths of the nested checkpoint.")] = "2,3,4,6,8",
    head_bits: Annotated[int | None, typer.Option(help="Width of embedding and head, if another.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="WIDTH=FILE.gguf, run right after that width.")] = None,
    llama_bench: Annotated[str, typer.Option(help="llama.cpp's program.")] = "llama-bench",
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens decoded after an empty prompt.")] = 64,
    threads: int = 2,
    rounds: int = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Decode and prefill of whole models, batch 1."""
    common = {"prompt": prompt, "tokens": tokens, "threads": threads}
    jobs: list[dict[str, Any]] = []
    peers = [entry.split("=", 1) for entry in peer or []]
    for width in map(int, bits.split(",")):
        jobs.append({"engine": "elastiq", "path": str(checkpoint), "bits": width, "head_bits": head_bits})
        jobs += [{"engine": "llama.cpp", "path": file, "bits": width} for at, file in peers if int(at) == width]
    if model is not None:
        jobs.append({"engine": "transformers", "path": str(model), "bits": 16})
    results: dict[int, list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    for number in range(rounds):
        for index, job in enumerate(jobs):
            result = measure({**job, **common, "check": number == 0, "llama_bench": llama_bench})
            if "absent" in result:
                absent[f"llama.cpp on {job['path']}"] = result["absent"]
            else:
                results.setdefault(index, []).append(result)
    rows = [summary(jobs[index], found) for index, found in results.items()]
    for row in rows:
        print_row(row)
    for name, reason in absent.items():
        print(f"skipped: {name} ({reason})")
    if json_file:
        write_json(json_file, {"rows": rows, "absent": absent, "threads": threads, "prompt": prompt, "tokens": tokens})


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement in a process of its own; {"absent": why} if the peer is not here or cannot."""
    if job["engine"] == "llama.cpp":
        return measure_llama(job)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_llama(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second by llama-bench, peak memory of its process, bytes of the tensors it reads per token."""
    try:
        import gguf

        command = [job["llama_bench"], "-m", job["path"], "-t", str(job["threads"]), "-r", "1", "-o", "json"]
        command += ["-p", str(job["prompt"]), "-n", str(job["tokens"])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
        rows = json.loads(output)
    except (ImportError, OSError, json.JSONDecodeError) as error:
        return {"absent": f"{type(error).__name__}: {error}"}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(job["path"]).tensors}
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    read = [t for name, t in tensors.items() if name != "token_embd.weight" or "output.weight" not in tensors]
    return {
        "decode": next(row["avg_ts"] for row in rows if row["n_gen"]),
        "prefill": next(row["avg_ts"] for row in rows if row["n_prompt"]),
        "peak_memory": usage.ru_maxrss * 1024,
        "bytes_per_token": sum(int(tensor.n_bytes) for tensor in read),
        "bits_per_weight": 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices),
    }


def summary(job: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, with the extremes of the decoding speed."""
    row = {"engine": job["engine"], "name": Path(job["path"]).stem, "bits": job["bits"], **found[0]}
    row |= {key: statistics.median(one[key] for one in found) for key in ("decode", "prefill")}
    speeds = [one["decode"] for one in found]
    return {**row, "decode_range": [min(speeds), max(speeds)], "rounds": len(found)}


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['engine']:>12} {row['name']:>24} {row['bits']:>2} ({row['bits_per_weight']:.2f} counted): "
        f"decode {row['decode']:.1f} tokens/s ({row['bytes_per_token'] / 1e6:.0f} MB each), "
        f"prefill {row['prefill']:.0f} tokens/s, peak {row['peak_memory'] / 1e6:.0f} MB"
        + (f", resident {row['resident'] / 1e6:.0f} MB over imports" if "resident" in row else "")
        + (f" ({row['resident'] / row['held']:.2f} of what is held)" if "held" in row else "")
        + (f", tokens by {row['way']}" if "way" in row else "")
        + (f", loaded in {row['load']:.2f} s ({row['read']:.2f} for a plain read)" if "load" in row else ""),
        flush=True,
    )


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own measures of elastiq or of transformers."""
    torch.set_num_threads(job["threads"])
    process = psutil.Process()
    read = seconds_of_reading(job) if job["engine"] == "elastiq" else 0.0
    baseline = process.memory_info().rss
    begin = time.perf_counter()
    if job["engine"] == "transformers":
        model: Any = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.bfloat16).eval()
        num_bytes = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
        head = model.get_output_embeddings().weight
        num_bytes += head.nbytes if head is model.get_input_embeddings().weight else 0
        result: dict[str, Any] = {"bytes_per_token": num_bytes, "bits_per_weight": 16.0}
    else:
        model = elastiq.load(job["path"], bits=widths(job), verify=False)
        result = {"load": time.perf_counter() - begin, "read": read}
        result["way"] = token_way(model)
        result |= {"bytes_per_token": bytes_per_token(model), "bits_per_weight": bits_per_weight(model)}
    ids = torch.randint(0, model.config.vocab_size, (1, job["prompt"]), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # Once before: at every doubling of the position the compiled token is compared with the modules, one time.
        seconds_of_decoding(model, ids[0, : job["tokens"] + 2], DynamicCache(config=model.config))
        cache = DynamicCache(config=model.config)
        result["decode"] = job["tokens"] / seconds_of_decoding(model, ids[0, : job["tokens"] + 2], cache)
        result["resident"] = process.memory_info().rss - baseline
        states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        result["held"] = bytes_in_memory(model) + sum(s.untyped_storage().nbytes() for s in states)
        del cache, states
        result["prefill"] = job["prompt"] / seconds_of_prefill(model, ids)
        result["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if job["check"] and job["engine"] == "elastiq":
            result["logit_error"] = check_logits(model, ids[:, :8])
        if job["engine"] == "elastiq":
            result["prefill_bfloat16"] = job["prompt"] / seconds_of_prefill(model.to(torch.bfloat16), ids)
    return result


def widths(job: dict[str, Any]) -> dict[str, int]:
    """{matrix: width} of the whole checkpoint."""
    outer = {"embedding": job["head_bits"], "head": job["head_bits"]}
    matrices = CheckpointReader(job["path"], verify=False).manifest.matrices
    return {name: outer.get(matrix.role) or job["bits"] for name, matrix in matrices.items()}


def seconds_of_reading(job: dict[str, Any]) -> float:
    """The files that a model at these widths is loaded from, into memory; read once before, so from the file cache."""
    last = max(widths(job).values())
    files = [Path(job["path"]) / name for name in (BASE, *map(plane_file, range(1, last + 1)))]
    for _ in range(2):
        begin = time.perf_counter()
        for file in files:
            file.read_bytes()
    return time.perf_counter() - begin


def seconds_of_decoding(model: Any, ids: torch.Tensor, cache: DynamicCache) -> float:
    """All but the first two of `ids`, one by one, each followed by the choice of a token as greedy decoding does."""
    for index, token in enumerate(ids):
        if index == 2:
            begin = time.perf_counter()
        int(model(token.view(1, 1), **with_cache(model, cache)).logits[0, -1].argmax())
    return time.perf_counter() - begin


def seconds_of_prefill(model: Any, ids: torch.Tensor) -> float:
    """All of `ids` [1, tokens] in one pass, after one over a few of them."""
    model(ids[:, : ids.shape[1] // 8], **with_cache(model, DynamicCache(config=model.config)), logits_to_keep=1)
    begin = time.perf_counter()
    model(ids, **with_cache(model, DynamicCache(config=model.config)), logits_to_keep=1)
    return time.perf_counter() - begin


def check_logits(model: Any, ids: torch.Tensor) -> float:
    """Relative difference between the logits of `ids` token by token and those of the torch twin in one pass."""
    cache = DynamicCache(config=model.config)
    found = torch.cat([model(token.view(1, 1), **with_cache(model, cache)).logits[0] for token in ids[0]])
    native.use("torch")
    expected = model(ids).logits[0]
    error = float((found - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        sys.exit(f"logits differ from the torch twin's by {error:.2e}: no speed is worth reporting")
    return error


def bytes_per_token(model: Any) -> int:
    """Bytes of planes, scales, zero points and everything else that one token reads; one row of an embedding table."""
    matrices = nested_matrices(model)
    tied = model.config.tie_word_embeddings
    read = [m for m in matrices.values() if tied or not isinstance(m, NestedEmbedding)]
    return sum(a.nbytes for m in read for a in m.read_arrays()) + sum(p.nbytes for p in model.parameters())


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
