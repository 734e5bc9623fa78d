"""llama.cpp's K-quant mixes, with an importance matrix of the calibration text, judged by `evaluate_dense`.

    python llamacpp_kquants.py MODEL_DIR --quantize PATH/llama-quantize --types Q2_K Q3_K_M Q4_K_S --json rows.json

Needs the package gguf. The decoder matrices alone are quantized (embedding and head stay float16), so that bits are
counted as everywhere here; rows must be divisible by 256. Which matrix gets which width is llama.cpp's own choice by
name and layer. Queries and keys keep the order of rows they have in the Hugging Face folder: every row is quantized on
its own, and the file is decoded here, never run.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from evaluate_dense import (
    calibration_arguments,
    decoder_linears,
    judge,
    load_dense,
    load_quantized,
    measure,
    read_windows,
    save_rows,
)
from torch import nn

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj`."""
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{_NAMES[rest]}.weight"


def write_float(model: nn.Module, path: Path) -> None:
    """The model as float16 GGUF, without a vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, linear in decoder_linears(model).items():
        writer.add_tensor(gguf_name(name), linear.weight.detach().half().numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().half().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().float().numpy())
    for index, layer in enumerate(model.model.layers):
        for name, norm in (("attn_norm", layer.input_layernorm), ("ffn_norm", layer.post_attention_layernorm)):
            writer.add_tensor(f"blk.{index}.{name}.weight", norm.weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def write_importance(model: nn.Module, windows: torch.Tensor, path: Path) -> None:
    """Mean squares of every matrix's inputs over the windows, in the older of llama.cpp's two file formats."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for name, linear in decoder_linears(model).items():

        def add(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            sums[name] = sums.get(name, 0) + args[0].flatten(0, -2).square().mean(0)

        hooks.append(linear.register_forward_pre_hook(add))
    for ids in windows:
        model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    with open(path, "wb") as file:
        file.write(np.int32(len(sums)).tobytes())
        for name, values in sums.items():
            encoded = gguf_name(name).encode()
            file.write(np.int32(len(encoded)).tobytes() + encoded)
            file.write(np.int32([len(windows), len(values)]).tobytes() + values.numpy().astype(np.float32).tobytes())


def decode(path: Path, model: nn.Module) -> tuple[dict[str, torch.Tensor], float, dict[str, int]]:
    """Decoded matrices, bits per weight counted from their bytes, and how many matrices have each type."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights, size, types = {}, 0, {}
    for name, linear in decoder_linears(model).items():
        tensor = tensors[gguf_name(name)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(linear.weight.shape)
        weights[name] = torch.from_numpy(np.array(values, dtype=np.float32))
        size += tensor.n_bytes
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return weights, 8 * size / sum(weight.numel() for weight in weights.values()), types


def quantize(args: Any, kind: str, source: Path, importance: Path, folder: Path) -> Path:
    """The file of one mix."""
    result = folder / f"{kind}.gguf"
    keep = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    command = [args.quantize, "--imatrix", importance, *keep, source, result, kind, "2"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return result


def main() -> None:
    """Read the arguments, make every mix, judge all in one pass."""
    parser = calibration_arguments(__doc__)
    parser.add_argument("--quantize", type=Path, required=True, help="llama.cpp's program llama-quantize")
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M"])
    args = parser.parse_args()
    model = load_dense(args.model_dir)
    windows = read_windows(args.model_dir, args.calibration, args.num_samples, args.seq_len)
    others: list[tuple[Mapping[str, Any], nn.Module]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_float(model, folder / "float.gguf")
        write_importance(model, windows, folder / "importance.dat")
        for kind in args.types:
            with measure() as meter:
                path = quantize(args, kind, folder / "float.gguf", folder / "importance.dat", folder)
            weights, bits, types = decode(path, model)
            row = {"peer": "llama.cpp", "variant": kind, "bits": None, "bits_per_weight": bits, "types": types}
            others.append((row | {"seconds": round(meter.seconds, 1)}, load_quantized(args.model_dir, weights)))
    save_rows(args.json, judge(args.model_dir, others, args.texts, args.windows, args.seq_len))


if __name__ == "__main__":
    main()
