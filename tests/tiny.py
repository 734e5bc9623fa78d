"""Tiny random models of many families, saved to a directory as their publishers would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HIDDEN = 64
VOCAB = 260

_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
_GEMMA = {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True}
_EXPERTS = {"num_experts_per_tok": 2}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "mistral": {**_LLAMA, "sliding_window": 8},
    "gemma": {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": _GEMMA,
    "gemma3": {
        **_GEMMA,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {**_LLAMA, "pad_token_id": 0, "original_max_position_embeddings": 256},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "opt": {
        "hidden_size": HIDDEN,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "vocab_size": VOCAB,
        "word_embed_proj_dim": HIDDEN,
    },
    "mixtral": {**_LLAMA, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {
        **_LLAMA,
        **_EXPERTS,
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}
_MODEL_TYPE = {"gemma3": "gemma3_text"}

FAMILIES: tuple[str, ...] = tuple(_SETTINGS)
MOE_FAMILIES: tuple[str, ...] = ("mixtral", "qwen3_moe")
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 258 tokens: the 256 bytes, <s> and </s>; it has a chat template.

    template: of its post-processor, such as `<s> $A`; it has none by default.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        special = [("<s>", 256), ("</s>", 257)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Configuration of a model with hidden size 64 and two blocks (Gemma 3: three, sliding, full, sliding)."""
    settings = {"bos_token_id": 256, "eos_token_id": 257, **_SETTINGS[family], **overrides}
    return AutoConfig.for_model(_MODEL_TYPE.get(family, family), **settings)


def make_model(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    max_shard_size: str | int = "5GB",
    **overrides: Any,
) -> Path:
    """Random model of `family` and its tokenizer, saved in `directory` (returned). `overrides` go to its configuration.

    Weights are large enough that every block changes its input visibly, and norms and biases are not constant.
    """
    directory = Path(directory)
    model = build_model(family, seed=seed, **overrides)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(directory)
    return directory


def build_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The same model in memory, float32, eval mode."""
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * 1.5 / HIDDEN**0.5)
    return model
