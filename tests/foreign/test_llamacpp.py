"""Exports in a real llama.cpp: `ELASTIQ_LLAMACPP=FOLDER pytest -m llamacpp`, outside of the ordinary suite."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import make_config
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import elastiq
from elastiq import embedded, recipes
from elastiq.checkpoint import CheckpointReader
from elastiq.foreign.exporting import GGUF, export
from elastiq.foreign.view import View

CHUNKS = 6
PROGRAMS = ("llama-perplexity", "llama-completion")

pytestmark = pytest.mark.llamacpp


@pytest.fixture(scope="module")
def programs() -> Path:
    folder = os.environ.get("ELASTIQ_LLAMACPP")
    if not folder:
        pytest.skip("ELASTIQ_LLAMACPP does not name a folder with the programs of llama.cpp")
    missing = [name for name in PROGRAMS if not (Path(folder) / name).is_file()]
    if missing:
        pytest.skip(f"ELASTIQ_LLAMACPP={folder} has no {' and no '.join(missing)}")
    return Path(folder)


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, whose protocol this shares."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import llamacpp

    return llamacpp


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The embedded model, or one of another family taught its text for a few steps; at levels 2, 3, 4, 5, 6 and 8."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            room = tmp_path_factory.mktemp(family)
            source = embedded.model_dir() if family == "embedded" else taught(family, room / "source")
            tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
            ids = tokenizer.encode(embedded.calibration_text()[:20000]).ids[:2048]
            recipe = recipes.gptq((2, 3, 4, 5, 6, 8), 32)
            elastiq.quantize(source, room / "nested", recipe, torch.tensor(ids).view(-1, 512))
            made[family] = room / "nested"
        return made[family]

    return get


def taught(family: str, directory: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir())
    if family in ("llama", "gemma", "gemma2", "gemma3"):
        tokenizer = spaced_tokenizer(prefix=family == "llama")
    shape: dict[str, object] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        shape |= {"n_embd": 256, "n_positions": 512}
    else:
        shape |= {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512, "head_dim": 64}
        shape |= {"initializer_range": 0.06}  # so that attention matters
    if family in ("gemma2", "gemma3"):
        shape["query_pre_attn_scalar"] = 64
    if family == "gemma3":
        shape |= {"num_hidden_layers": 6, "layer_types": None}  # llama.cpp lets one layer in six see everything
    if family == "mistral":
        shape["sliding_window"] = None  # llama.cpp has none for it
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family, **shape)).float()
    ids = torch.tensor(tokenizer(embedded.calibration_text()).input_ids)
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = windows[8 * step : 8 * step + 8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def spaced_tokenizer(prefix: bool) -> PreTrainedTokenizerFast:
    """As SentencePiece's: characters with marks for spaces, single bytes behind them; Llama's adds one mark before."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.train_from_iterator(
        embedded.calibration_text().splitlines(), trainers.BpeTrainer(vocab_size=700, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    kept = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate([*kept, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    marks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(marks if prefix else marks[1:])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>")


FAMILIES = ["embedded", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_generates_and_agrees(
    checkpoint: Callable[[str], Path], programs: Path, llamacpp: ModuleType, tmp_path: Path, family: str
) -> None:
    """Perplexity within 0.5% of what torch makes of the same file, at every type; of most families at three."""
    nested, text, file = checkpoint(family), tmp_path / "text.txt", tmp_path / "model.gguf"
    text.write_text(embedded.heldout_text(), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(nested / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(embedded.heldout_text(), add_special_tokens=False).ids)
    windows = ids[: 512 * CHUNKS].view(-1, 512)
    for kind, bits in llamacpp.TYPES.items():
        if family not in ("embedded", "gpt2") and kind not in ("Q3_K", "Q4_K", "Q8_0"):
            continue
        target = GGUF(kind)
        export(nested, file, target, bits)
        there = llamacpp.there(programs, file, text, CHUNKS)
        here = llamacpp.here(target.open(file, View(CheckpointReader(nested), bits)), windows)
        assert abs(there / here - 1) < 0.005, (kind, there, here)
        said = llamacpp.continued(programs, file, llamacpp.PROMPT).strip()
        assert said.startswith(llamacpp.PROMPT), (kind, said)
        assert family != "embedded" or said != llamacpp.PROMPT, kind
        file.unlink()
