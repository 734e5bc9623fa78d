"""Write a Llama of random weights, so that time and memory can be measured at a size that no real model here has.

The default is the shape of TinyLlama-1.1B. Nothing about the quality of a method can be read from such a model.

    python benchmarks/make_random_llama.py OUT_DIR
    python benchmarks/make_random_llama.py OUT_DIR --layers 2 --shard-mb 50

The shards are written tensor by tensor straight to disk, so that peak memory is that of the largest matrix in float32
and in the stored type, whatever the model's size. Every tensor has its own seed: the weights depend neither on the
size of the shards nor on the number of layers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
STORED = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}


@dataclass(frozen=True)
class Shape:
    """The sizes that define the architecture; the head dimension is hidden / heads."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order in which the model reads them."""
        kv = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            block = f"model.layers.{layer}."
            yield block + "input_layernorm.weight", (self.hidden,)
            yield block + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield block + "self_attn.k_proj.weight", (kv, self.hidden)
            yield block + "self_attn.v_proj.weight", (kv, self.hidden)
            yield block + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield block + "post_attention_layernorm.weight", (self.hidden,)
            yield block + "mlp.gate_proj.weight", (self.mlp, self.hidden)
            yield block + "mlp.up_proj.weight", (self.mlp, self.hidden)
            yield block + "mlp.down_proj.weight", (self.hidden, self.mlp)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self, dtype: str, context: int, std: float) -> dict[str, object]:
        """The Hugging Face configuration of this architecture."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dtype": dtype,
            "eos_token_id": 0,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": std,
            "intermediate_size": self.mlp,
            "max_position_embeddings": context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": None,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }


def plan_shards(
    tensors: list[tuple[str, tuple[int, ...]]], element_bytes: int, limit: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cut the list of tensors into runs of at most `limit` bytes; a single tensor above the limit has its own run."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in tensors:
        size = math.prod(shape) * element_bytes
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append((name, shape))
        held += size
    return shards


def random_tensor(shape: tuple[int, ...], seed: int, std: float, dtype: torch.dtype) -> torch.Tensor:
    """A normal matrix of standard deviation `std`, or, for a vector (a norm's gain), ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(0.0, std, generator=generator).to(dtype)


def write_header(file: BinaryIO, shard: list[tuple[str, tuple[int, ...]]], code: str, element_bytes: int) -> None:
    """The safetensors header: its length in 8 bytes, then JSON, padded so that the data begin at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard:
        end = offset + math.prod(shape) * element_bytes
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)


def write_model(out_dir: Path, shape: Shape, dtype: str, std: float, seed: int, shard_bytes: int) -> int:
    """Write shards and index into `out_dir`; returns the number of parameters."""
    torch_dtype, code = STORED[dtype]
    element_bytes = torch_dtype.itemsize
    tensors = list(shape.tensors())
    seeds = {name: seed * 1_000_003 + index for index, (name, _) in enumerate(tensors)}
    shards = plan_shards(tensors, element_bytes, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (out_dir / file_name).open("wb") as file:
            write_header(file, shard, code, element_bytes)
            for name, size in shard:
                tensor = random_tensor(size, seeds[name], std, torch_dtype)
                file.write(memoryview(tensor.view(torch.uint8).reshape(-1).numpy()))
                weight_map[name] = file_name
        print(f"{file_name}: {len(shard)} tensors", flush=True)
    count = sum(math.prod(size) for _, size in tensors)
    index = {"metadata": {"total_size": count * element_bytes}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return count


def main() -> None:
    """Read the arguments, write the model's directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", choices=sorted(STORED), default="bfloat16")
    parser.add_argument("--std", type=float, default=0.02, help="standard deviation of every matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, default=500, help="largest shard in units of 10^6 bytes")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path("../shared/models/lm-books"),
        help="folder whose tokenizer files travel along (its ids may cover less than --vocab)",
    )
    args = parser.parse_args()
    if args.hidden % args.heads or args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} must divide --hidden {args.hidden}, --kv-heads {args.kv_heads} the heads")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    shape = Shape(args.hidden, args.mlp, args.layers, args.heads, args.kv_heads, args.vocab)
    config = shape.config(args.dtype, args.context, args.std)
    (args.out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copied = [name for name in TOKENIZER_FILES if (args.tokenizer / name).is_file()]
    if not copied:
        parser.error(f"--tokenizer {args.tokenizer} holds none of {', '.join(TOKENIZER_FILES)}")
    for name in copied:
        shutil.copyfile(args.tokenizer / name, args.out_dir / name)
    count = write_model(args.out_dir, shape, args.dtype, args.std, args.seed, args.shard_mb * 1_000_000)
    print(f"{count:,} parameters in {args.out_dir}")


if __name__ == "__main__":
    main()
