"""Try every causal language model that this transformers knows, tiny and random: docs/families.md is what comes out.

python scripts/families.py            tries all and writes the page (many minutes)
python scripts/families.py llama mpt  tries these and replaces their lines in the page
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import math
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import elastiq

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
VOCAB = 260
BOUND = 0.05
"""Gap of the logits, relative to the original's, that plain rounding to 8 bits stays below with these weights at most
positions (the median): where a router chooses another expert, a position is far off and nothing is wrong."""
ROUNDING = 2**-8
"""Size of the error of rounding to 8 bits in groups of 16, relative to the weights."""
RECIPE = partial(elastiq.recipes.rtn, levels=(8,), group_size=16)
NEW_TOKENS = 3
IDS = torch.randint(3, VOCAB - 4, (2, 24), generator=torch.Generator().manual_seed(1))

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "sliding_window": 8,
    "is_decoder": True,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What a configuration is made small by, wherever it has an entry of the name."""

OWN: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in ("axk2", "deepseek_v32", "glm_moe_dsa")},
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts": 8},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "codegen": {"rotary_dim": 8},
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16, "global_head_dim": 16, "num_kv_shared_layers": 0,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48},
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "num_buckets": 2},
    "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "n_words": VOCAB, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid"] * 2, "hybrid_layer_ids": [2, 5]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single families need besides."""


@dataclass(frozen=True)
class Outcome:
    """What came out for one family: `said` in the two columns, and whether nothing is wrong."""

    architecture: str
    blocks: str
    embeddings: str
    fine: bool

    def row(self, model_type: str) -> str:
        return f"| `{model_type}` | {self.architecture} | {self.blocks} | {self.embeddings} |"


def architectures() -> dict[str, str]:
    """Class of the causal language model by model type."""
    found = {}
    for config, model in AutoModelForCausalLM._model_mapping.items():
        cls = model[0] if isinstance(model, tuple) else model
        found[config.model_type] = cls.__name__
    return dict(sorted(found.items()))


def small_config(model_type: str) -> PretrainedConfig:
    """A tiny configuration of the family."""
    known = AutoConfig.for_model(model_type).to_dict()
    settings = {name: value for name, value in SIZES.items() if name in known}
    for name, value in known.items():
        if name.endswith("_config") and isinstance(value, dict):
            settings[name] = {key: size for key, size in SIZES.items() if key in value}
    if "qk_rope_head_dim" in known and "head_dim" in known:
        settings["head_dim"] = SIZES["qk_rope_head_dim"]
    return AutoConfig.for_model(model_type, **{**settings, **OWN.get(model_type, {})})


def make(model_type: str, directory: Path) -> PreTrainedModel:
    """The tiny model of the family, saved with a tokenizer in `directory`. Its weights are large enough that every
    block matters, its norms and biases not constant."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(model_type), dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * 1.5 / max(parameter.shape[-1], 16) ** 0.5)
    for module in model.modules():  # transformers empties this row of some families whenever it loads them (Youtu)
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0
    model.half().float()(input_ids=IDS[:1], use_cache=False)
    model.save_pretrained(directory)
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(directory)
    return model


def attempt(model_type: str, architecture: str, work: Path) -> Outcome:
    """Quantize the tiny model with and without its embeddings, load it both ways, compare and generate."""
    with quiet():
        try:
            model = make(model_type, work / "model")
        except Exception as error:
            return Outcome(architecture, f"not tried: {_first_line(error)}", "", True)
        bound, follows = _bound(model), _follows(model)
        said, fine = [], True
        for embeddings in (False, True):
            try:
                said.append(_gap(model, work, embeddings, bound, follows))
            except elastiq.ElastiqError as error:
                said.append(f"refused: {_without_path(str(error), work)}")
            except Exception as error:
                said.append(f"**fails**: {type(error).__name__}: {_first_line(error)}")
            fine &= not said[-1].startswith("**")
    blocks, with_embeddings = said
    return Outcome(architecture, blocks, "" if with_embeddings == blocks != "right" else with_embeddings, fine)


def _gap(model: PreTrainedModel, work: Path, embeddings: bool, bound: float, follows: bool) -> str:
    ids = IDS
    output = work / f"out-{embeddings}"
    elastiq.quantize(work / "model", output, RECIPE(embeddings=embeddings), ids)
    wanted = _centred(model(input_ids=ids[:1], use_cache=False).logits)
    for name, load in (("elastiq.load", elastiq.load), ("from_pretrained", AutoModelForCausalLM.from_pretrained)):
        loaded = load(output)
        found = _centred(loaded(input_ids=ids[:1], use_cache=False).logits)
        gap = _median_gap(found, wanted)
        if not gap < bound:
            return f"**wrong**: {name} is {gap:.0%} from the original"
        if follows and not _generates(loaded, ids[:1]):
            return f"**wrong**: generate after {name} does not follow the model's own logits"
    return "right"


def _bound(model: PreTrainedModel) -> float:
    """BOUND, or twice what random changes of the size of rounding do to a model that makes much of them (Zamba)."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted(twin.named_parameters()):
        if parameter.dim() > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * ROUNDING)
    logits = [_centred(each(input_ids=IDS[:1], use_cache=False).logits) for each in (twin, model)]
    return max(BOUND, 2 * _median_gap(logits[0], logits[1]))


def _median_gap(found: Tensor, wanted: Tensor) -> float:
    gaps = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(gaps.median()) if bool(gaps.isfinite().all()) else math.inf


def _follows(model: PreTrainedModel) -> bool:
    """Whether generating with the original gives what its logits say; of some of these tiny models it does not."""
    try:
        return _generates(model, IDS[:1])
    except Exception:
        return False


def _generates(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether every generated token has the largest logit after those before it, computed without a cache."""
    with torch.no_grad():
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=0, num_beams=1,
        )  # fmt: skip
        logits = model(input_ids=text[:, :-1], use_cache=False).logits[:, ids.shape[1] - 1 :]
    chosen = logits.gather(-1, text[:, ids.shape[1] :, None])[..., 0]
    return text.shape[1] == ids.shape[1] + NEW_TOKENS and bool((logits.max(dim=-1).values - chosen < 1e-2).all())


def _centred(logits: Tensor) -> Tensor:
    return logits.detach().float() - logits.detach().float().mean(dim=-1, keepdim=True)


def _without_path(text: str, work: Path) -> str:
    text = re.sub(rf"{re.escape(str(work))}/[\w.-]*:? ?", "", text)
    return " ".join(text.replace("/result: ", "").split()).replace("|", "\\|")


def _first_line(error: Exception) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__)[:160].replace("|", "\\|")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say on the way."""
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def rows_of(text: str) -> dict[str, str]:
    """The lines of a page's table by model type."""
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def page(lines: Mapping[str, str]) -> str:
    """docs/families.md, of a line for every family."""
    cells = [line.split("|")[3].strip() for line in lines.values()]
    right = cells.count("right")
    refused, untried = (sum(cell.startswith(word) for cell in cells) for word in ("refused", "not tried"))
    rows = "\n".join(lines[name] for name in sorted(lines))
    return f"""# Families

<!-- Generated by scripts/families.py; run it again instead of editing. -->

Which causal language models of transformers {transformers.__version__} can be quantized: {right} of
{len(lines)} families are right, {refused} are refused with the reason below, and of {untried} no tiny model could be
made. Nothing here is a list that elastiq reads: it looks at a model's structure. The page is made by a test of each on
a tiny random model: quantized by plain rounding to 8 bits, loaded with `elastiq.load` and with `from_pretrained`,
logits within {BOUND:.0%} of the original's (or what random changes of that size do, where it is more), and {NEW_TOKENS}
generated tokens that follow the model's own logits, where those of the original do; once more with `--embeddings`,
where the input embedding and the head are quantized too. `make families` writes it anew.

| model type | class | blocks | with embeddings |
|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; none: all")
    chosen = parser.parse_args().families
    known = architectures()
    outcomes = {}
    transformers.utils.logging.disable_progress_bar()
    for model_type in chosen or known:
        work = Path(tempfile.mkdtemp())
        try:
            outcomes[model_type] = attempt(model_type, known[model_type], work)
        finally:
            shutil.rmtree(work)
        print(outcomes[model_type].row(model_type), flush=True)
    before = rows_of(PAGE.read_text(encoding="utf-8")) if chosen and PAGE.is_file() else {}
    lines = before | {name: outcome.row(name) for name, outcome in outcomes.items()}
    PAGE.write_text(page(lines), encoding="utf-8")
    sys.exit(not all(outcome.fine for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
