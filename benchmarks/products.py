"""Speed of products with bit planes against a plain read of the same bytes, torch and ggml; called by run.py.

Weights rotate through more than 1 GB, so that they come from memory. Every figure is a median over calls that alternate
between what is compared. Nothing is timed before the results were compared with double precision in this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elastiq.kernels.matmul import TiledWeight, cpu, reference
from elastiq.linalg import native

ARENA = 1_100_000_000
"""Bytes that the copies of a matrix take together."""
SHAPES = ((4096, 4096), (2048, 5632), (11008, 4096))
WIDTHS = (1, 2, 3, 4, 6, 8)
MODES = {"int16": 2e-4, "int8": 3e-2, "float": 1e-5}
"""Largest relative error of a mode before anything is timed."""


class Arena:
    """Random planes of 8 bits and more than `ARENA` bytes, cut into as many matrices of a width as they hold."""

    def __init__(self) -> None:
        self.memory = torch.randint(-(2**62), 2**62, (ARENA // 8,)).view(torch.uint8)
        self.memory = self.memory[-self.memory.data_ptr() % 64 :]

    def matrices(self, shape: tuple[int, int], group_size: int, bits: int) -> list[TiledWeight]:
        """Matrices of whole tiles and groups; their scales are of their own, so that these come from memory too."""
        out, width = shape
        plane = out * width // 8
        grid = (out // 16, width // group_size, 16)
        count = max(2, len(self.memory) // (plane * bits + 2 * out * width // group_size * 2))
        weights = []
        for i in range(count):
            planes = [self.memory[(i * bits + p) * plane :][:plane] for p in range(bits)]
            planes = [part.view(out // 16, width // 32, 16, 4) for part in planes]
            scale, zero_point = torch.rand(grid) * 0.01, 2 ** (bits - 1) + torch.rand(grid)
            weights.append(TiledWeight(planes, scale.half(), zero_point.half(), bits, out, width, group_size))
        return weights


class PlainRead:
    """Reads arrays side by side with as many threads, as read.cpp does."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        library = Path(self.directory.name) / "read.so"
        command = ["c++", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*command, str(Path(__file__).with_name("read.cpp")), "-o", str(library)], check=True)
        self.function = ctypes.CDLL(str(library)).read_streams

    def of(self, weight: TiledWeight) -> Callable[[], Any]:
        arrays = [*weight.planes, weight.scale, *([] if weight.zero_point is None else [weight.zero_point])]
        pointers = (ctypes.c_void_p * len(arrays))(*[array.data_ptr() for array in arrays])
        sizes = (ctypes.c_int64 * len(arrays))(*[array.nbytes for array in arrays])
        return lambda: self.function(pointers, sizes, len(arrays), torch.get_num_threads())


def num_bytes(weight: TiledWeight) -> int:
    zero_point = 0 if weight.zero_point is None else weight.zero_point.nbytes
    return sum(plane.nbytes for plane in weight.planes) + weight.scale.nbytes + zero_point


def alternate(cases: dict[str, list[Callable[[], Any]]], seconds: float) -> dict[str, float]:
    """Median microseconds of each case's calls, the cases taking turns, each going round its own copies."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 8:
        for name, calls in cases.items():
            call = calls[turn % len(calls)]
            begin = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - begin) * 1e6)
        turn += 1
    return {name: statistics.median(values[2:]) for name, values in samples.items()}


def check(weight: TiledWeight, x: Tensor, path: str, mode: str, limit: float | None = None) -> float:
    """Relative error of a product against double precision. Raises SystemExit if it is too large."""
    expected = x.double() @ reference.decode(weight).double().T
    error = float((cpu.matmul(path, x, weight, None, mode).double() - expected).norm() / expected.norm())
    if not error < (limit or MODES[mode]):
        raise SystemExit(f"{path}, {mode}, {weight.bits} bits: relative error {error:.1e}; no speed is measured")
    return error


def absent_peers() -> dict[str, str]:
    """Why each peer at batch 1 that is not here is skipped."""
    ops = {"torch int8pack": "_weight_int8pack_mm", "torch int4pack": "_weight_int4pack_mm_for_cpu"}
    absent = {
        name: f"torch {torch.__version__} has no {op}" for name, op in ops.items() if not hasattr(torch.ops.aten, op)
    }
    root = os.environ.get("GGML")
    if root is None or not (Path(root) / "build" / "bin").is_dir() or not any(Path(root).rglob("ggml-backend.h")):
        absent["ggml"] = "GGML names no directory of llama.cpp with its headers and build/bin"
    return absent


def torch_peers(shape: tuple[int, int], x: Tensor) -> dict[str, list[Callable[[], Any]]]:
    """Torch's own products at batch 1: bfloat16, 8 bits per row, 4 bits in groups of 128, those that are here."""
    out, width = shape
    x = x.bfloat16()

    def copies(size: float) -> range:
        return range(max(2, int(ARENA // size)))

    dense = [torch.randn(out, width).bfloat16() for _ in copies(2 * out * width)]
    peers: dict[str, list[Callable[[], Any]]] = {"torch bf16": [lambda w=w: F.linear(x, w) for w in dense]}
    absent = absent_peers()
    if "torch int8pack" not in absent:
        int8 = [torch.randint(-128, 127, (out, width), dtype=torch.int8) for _ in copies(out * width)]
        step = torch.rand(out).bfloat16()
        peers["torch int8pack"] = [lambda w=w: torch.ops.aten._weight_int8pack_mm(x, w, step) for w in int8]
    if "torch int4pack" in absent:
        return peers
    codes = torch.randint(0, 16, (out, width), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    int4 = [packed.clone() for _ in copies(out * width / 2)]
    steps = torch.rand(width // 128, out, 2).bfloat16()
    peers["torch int4pack"] = [lambda w=w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 128, steps) for w in int4]
    return peers


def ggml_rows(shape: tuple[int, int], threads: int) -> dict[str, float]:
    """Microseconds of ggml's fastest product per type; empty where ggml is absent."""
    if "ggml" in absent_peers():
        return {}
    source, root = Path(__file__).parent / "peers" / "ggml_matmul.cpp", Path(os.environ["GGML"])
    libraries = root / "build" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "ggml"
        include = next(root.rglob("ggml-backend.h")).parent
        flags = ["-std=c++17", "-O2", f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
        subprocess.run(
            ["c++", str(source), *flags, "-lggml", "-lggml-base", "-lggml-cpu", "-o", str(program)], check=True
        )
        result = subprocess.run([str(program), *map(str, shape), str(threads)], check=True, capture_output=True)
    return dict(json.loads(result.stdout))


def matmul_rows(shapes: tuple[tuple[int, int], ...], group_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One token, the default path and mode, each width and number of threads."""
    arena, read, path = Arena(), PlainRead(), native.current()
    most = torch.get_num_threads()
    for shape in shapes:
        x = torch.randn(1, shape[1])
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            peers = alternate(torch_peers(shape, x), 2 * seconds) | ggml_rows(shape, threads)
            for bits in WIDTHS:
                weights = arena.matrices(shape, group_size, bits)
                error = check(weights[0], x, path, "int16")
                cases: dict[str, list[Callable[[], Any]]] = {
                    "read": [read.of(w) for w in weights],
                    "product": [lambda w=w, x=x: cpu.matmul(path, x, w) for w in weights],
                }
                times = alternate(cases, seconds)
                yield {
                    "shape": f"{shape[0]}x{shape[1]}", "bits": bits, "threads": threads, "path": path,
                    "activations": "int16", "group_size": group_size, "error": error,
                    "microseconds": times["product"],
                    "gigabytes_per_second": num_bytes(weights[0]) / times["product"] / 1e3,
                    "fraction_of_read": times["read"] / times["product"],
                    "ratio": {name: value / times["product"] for name, value in peers.items()},
                }  # fmt: skip
        torch.set_num_threads(most)


def path_rows(shape: tuple[int, int], group_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One token and four, each compiled path and mode."""
    arena, read, threads = Arena(), PlainRead(), torch.get_num_threads()
    paths = [path for path in native.paths() if path not in ("torch", "amx", "avx512")]
    for bits in WIDTHS:
        weights = arena.matrices(shape, group_size, bits)
        for path in paths:
            few = weights[:2] if path == "portable" else weights
            for mode in MODES:
                for tokens in (1, 4):
                    x = torch.randn(tokens, shape[1])
                    error = check(weights[0], x, path, mode)
                    product = [lambda w=w, x=x, mode=mode, path=path: cpu.matmul(path, x, w, None, mode) for w in few]
                    times = alternate({"read": [read.of(w) for w in weights], "product": product}, seconds)
                    yield {
                        "shape": f"{shape[0]}x{shape[1]}", "bits": bits, "threads": threads, "path": path,
                        "activations": mode, "tokens": tokens, "group_size": group_size, "error": error,
                        "microseconds": times["product"], "fraction_of_read": times["read"] / times["product"],
                    }  # fmt: skip


def prefill_rows(shape: tuple[int, int], group_size: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Many tokens at once in bfloat16 and in float32, against torch's products with dense weights."""
    arena, path, threads = Arena(), native.current(), torch.get_num_threads()
    dense = {dtype: [torch.randn(shape).to(dtype) for _ in range(4)] for dtype in (torch.bfloat16, torch.float32)}
    for tokens in (32, 128, 512):
        for dtype, limit in ((torch.bfloat16, 1e-2), (torch.float32, 2e-4)):
            x = torch.randn(tokens, shape[1]).to(dtype)
            for bits in WIDTHS:
                weights = arena.matrices(shape, group_size, bits)
                error = check(weights[0], x, path, "int16", limit)
                cases: dict[str, list[Callable[[], Any]]] = {
                    "product": [lambda w=w, x=x: cpu.matmul(path, x, w) for w in weights],
                    "torch": [lambda w=w, x=x: F.linear(x, w) for w in dense[dtype]],
                }
                times = alternate(cases, seconds)
                name = str(dtype).removeprefix("torch.")
                yield {
                    "shape": f"{shape[0]}x{shape[1]}", "bits": bits, "threads": threads, "path": path, "tokens": tokens,
                    "dtype": name, "group_size": group_size, "error": error, "microseconds": times["product"],
                    "gigaflops": 2e-3 * tokens * shape[0] * shape[1] / times["product"],
                    "ratio": {f"torch {name}": times["torch"] / times["product"]},
                }  # fmt: skip
