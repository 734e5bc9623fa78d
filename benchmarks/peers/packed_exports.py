"""Do GPTQModel and transformers compute what an export of elastiq says?

    python packed_exports.py ROOT --text TEXT --json rows.json

Every directory of ROOT is one case of three model directories: `packed` (GPTQ or AWQ, as `elastiq export` wrote it),
`refitted` (what `elastiq import` makes of it) and `level` (`elastiq export --to hf` at the same widths). Both loaders
open `packed` on the CPU with GPTQModel's kernels in plain torch (others it would compile at run time), in float32 but
for GPTQ in GPTQModel, which takes 16 bits; the figures are relative norms of the difference of all logits on windows of
TEXT.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The first as in gptqmodel_gptq.py; the others keep it from compiling extensions and kernels in the middle of the run.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from evaluate_dense import read_windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig


def method_of(path: Path) -> str:
    settings = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    return str(settings.get("quant_method", ""))


def by_transformers(path: Path) -> nn.Module:
    kernels = {"gptq": GPTQConfig(bits=4, backend="gptq_torch"), "awq": AwqConfig(backend="torch_awq")}
    settings = {"quantization_config": kernels[method_of(path)]} if method_of(path) else {}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **settings)
    return model


def by_gptqmodel(path: Path) -> nn.Module:
    from gptqmodel import BACKEND, GPTQModel

    kernels = {"gptq": (BACKEND.GPTQ_TORCH, torch.float16), "awq": (BACKEND.AWQ_TORCH, torch.float32)}
    backend, dtype = kernels[method_of(path)]
    model: nn.Module = GPTQModel.load(str(path), device="cpu", dtype=dtype, backend=backend).model
    return model


LOADERS: dict[str, Callable[[Path], nn.Module]] = {"gptqmodel": by_gptqmodel, "transformers": by_transformers}


@torch.inference_mode()
def logits(load: Callable[[Path], nn.Module], path: Path, windows: Tensor) -> tuple[Tensor, str]:
    """Logits [windows, tokens, vocabulary] and the kind of layer that the first query projection became."""
    model = load(path).eval()
    kind = next(type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj"))
    found = torch.cat([model(input_ids=ids[None], use_cache=False).logits.double() for ids in windows])
    del model
    gc.collect()
    return found, kind


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    """Read the arguments, run every case with every loader, print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--loaders", nargs="+", default=list(LOADERS), choices=LOADERS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in sorted(path for path in args.root.iterdir() if (path / "packed").is_dir()):
        windows = read_windows(case / "level", args.text, args.windows, args.seq_len)
        refitted, _ = logits(by_transformers, case / "refitted", windows)
        level, _ = logits(by_transformers, case / "level", windows)
        for loader in args.loaders:
            row: dict[str, Any] = {"case": case.name, "loader": loader, "version": version(loader)}
            try:
                found, row["layer"] = logits(LOADERS[loader], case / "packed", windows)
            except Exception as error:  # a loader that refuses is a result
                row["refused"] = f"{type(error).__name__}: {error}"[:400]
            else:
                row |= {"to_refitted": apart(found, refitted), "to_level": apart(found, level)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
