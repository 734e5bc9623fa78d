"""Settings of packed directories: which of them may say what, since what is not known cannot be unpacked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import ElastiqError
from .read_back import REMEDY

Known = Mapping[str, Any]
"""Accepted values by setting, a `Known` for a table of settings, None for any value; a trailing * is any ending."""


def check_settings(directory: Path, settings: Mapping[str, Any], known: Known, prefix: str = "") -> None:
    """Raises ElastiqError naming a setting that is not known, or not with its value; what is empty says nothing."""
    for key, value in settings.items():
        if value is None or value is False or value in ("", {}, []):
            continue
        name = next((name for name in known if name == key or (name[-1:] == "*" and key.startswith(name[:-1]))), None)
        allowed = known[name] if name is not None else ()
        if isinstance(allowed, Mapping) and isinstance(value, Mapping):
            check_settings(directory, value, allowed, f"{prefix}{key}.")
        elif allowed is not None and not (isinstance(allowed, tuple) and value in allowed):
            raise ElastiqError(f"{directory}: {prefix}{key} is {value!r} in its settings, which is not read; {REMEDY}")


_FORMATS = ("gptq", "gptq_v2")
GPTQ: Known = {
    **dict.fromkeys((
        # said by the arrays
        "quant_method", "method", "bits", "group_size", "desc_act", "sym", "lm_head", "dynamic", "act_group_aware",
        # how it was made, and how it is run
        "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "meta", "dataset",
        "tokenizer", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size",
        "pad_token_id", "model_name_or_path", "model_file_base_name", "quantizer", "version", "backend",
        "use_cuda_fp16", "use_exllama", "exllama_config", "disable_exllama", "max_input_length",
        "cache_block_outputs", "modules_in_block_to_quantize", "offload_to_disk*", "hyb_act",
    )),
    "checkpoint_format": _FORMATS,
    "format": _FORMATS,
    "pack_dtype": ("int32",),
}  # fmt: skip
AWQ: Known = {
    **dict.fromkeys((
        "quant_method", "bits", "w_bit", "group_size", "q_group_size", "version", "modules_to_not_convert", "backend",
        "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config",
    )),
    "zero_point": (True,),
}  # fmt: skip
_WEIGHTS: Known = {
    **dict.fromkeys((
        "num_bits", "symmetric", "strategy", "group_size", "actorder", "observer*", "scale_dtype", "zp_dtype",
    )),
    "type": ("int",),
}  # fmt: skip
COMPRESSED: Known = {
    **dict.fromkeys(("quant_method", "format", "quantization_status", "global_compression_ratio", "ignore", "version")),
    "config_groups": {"*": {"targets": None, "format": ("pack-quantized",), "weights": _WEIGHTS}},
    "sparsity_config": {"format": ("dense",), "registry_requires_subclass": None, "global_sparsity": None,
                        "ignore": None, "targets": None},
}  # fmt: skip
BITSANDBYTES: Known = dict.fromkeys((
    "quant_method", "load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit", "bnb_4bit_*", "llm_int8_*",
))  # fmt: skip
