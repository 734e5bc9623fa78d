"""Train the model in `src/elastiq/embedded` on the documentation that every Python installation carries.

    OMP_NUM_THREADS=1 python scripts/train_embedded.py

gathers the text, cuts off the held-out documents, trains the tokenizer and the model, measures the held-out perplexity
and writes the whole directory. Text and tokenizer follow from the Python version alone, the weights from the seed too,
and in their last digits from the processor. It takes 22 minutes of one core with AVX-512 BF16.

The documentation alone is 2 MB, which a model of this size soon learns by heart. So the first steps are mostly source
code of the same library, and the last ones documentation only.
"""

import ast
import hashlib
import itertools
import math
import os
import platform
import shutil
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKIPPED = {"site-packages", "test", "tests", "idle_test", "idlelib", "tkinter", "lib2to3", "turtledemo", "pydoc_data"}
HELDOUT_BYTES = 145_000
CALIBRATION_BYTES = 295_000
SHORTEST_DOCUMENT = 100
LONGEST_HELDOUT_DOCUMENT = 16_000
SHINGLE = 13
UNSEEN_CODE = SKIPPED | {"encodings"}
VOCAB_SIZE = 2048
END = "<|endoftext|>"
SEQ_LEN = 512
STEP_TOKENS = 8 * SEQ_LEN
CODE_UNTIL = 0.65
SHORT_UNTIL = 0.75


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def rank(self) -> str:
        """Place in an arbitrary but fixed order."""
        return hashlib.sha256(self.name.encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    train: list[Document]
    code: list[Document]
    heldout: list[Document]
    calibration: list[Document]


# corpus


def signature(node: ast.AST, path: str) -> str:
    match node:
        case ast.ClassDef():
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            return f"class {path}({bases}):" if bases else f"class {path}:"
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return f"def {path}({ast.unparse(node.args)}):"
    raise TypeError(f"no signature for {type(node).__name__}")


def described(node: ast.AST, prefix: str) -> Iterator[str]:
    """Signatures and docstrings of the classes and functions inside `node`, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            path = f"{prefix}{child.name}"
            if doc := ast.get_docstring(child):
                body = "\n".join(f"    {line}".rstrip() for line in doc.strip().splitlines())
                yield f"{signature(child, path)}\n{body}"
            yield from described(child, f"{path}.")
        else:
            yield from described(child, prefix)


def modules(skipped: set[str]) -> Iterator[Document]:
    """Source of the standard library's modules, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if skipped.isdisjoint(relative.parts):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            yield Document(name, file.read_text(encoding="utf-8", errors="replace"))


def docstrings(module: Document) -> Document:
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(module.text)
    parts = [(ast.get_docstring(tree) or "").strip(), *described(tree, "")]
    return Document(module.name, "\n\n".join([f"Module {module.name}", *filter(None, parts)]))


def documentation() -> list[Document]:
    from_topics = [Document(f"topic {name}", text.strip()) for name, text in sorted(topics.items())]
    return [d for d in from_topics + [docstrings(m) for m in modules(SKIPPED)] if len(d.text) >= SHORTEST_DOCUMENT]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def without_repeats(document: Document, seen: set[str], forbidden: set[tuple[str, ...]]) -> Document:
    """Drop the paragraphs that stood in an earlier document, or share 13 successive words with held-out text."""
    kept = []
    for paragraph in document.text.split("\n\n"):
        words = paragraph.split()
        key = " ".join(words)
        if len(words) > 5 and (key in seen or not forbidden.isdisjoint(shingles(paragraph))):
            continue
        seen.add(key)
        kept.append(paragraph)
    return Document(document.name, "\n\n".join(kept))


def take(candidates: list[Document], limit: int) -> list[Document]:
    """The first documents whose joined text stays within `limit` bytes."""
    sizes = itertools.accumulate(len(d.text.encode()) + 3 for d in candidates)
    return [d for d, size in zip(candidates, sizes, strict=True) if size <= limit]


def split(found: list[Document], code: list[Document]) -> Corpus:
    ranked = sorted(found, key=lambda d: d.rank)
    heldout = take([d for d in ranked if len(d.text) <= LONGEST_HELDOUT_DOCUMENT], HELDOUT_BYTES)
    names = {d.name for d in heldout}
    seen: set[str] = set()
    heldout = [without_repeats(d, seen, set()) for d in heldout]
    forbidden = set().union(*(shingles(d.text) for d in heldout))
    train = [without_repeats(d, seen, forbidden) for d in ranked if d.name not in names]
    train = [d for d in train if len(d.text) >= SHORTEST_DOCUMENT]
    seen_code: set[str] = set()
    code = [without_repeats(d, seen_code, forbidden) for d in code if d.name not in names]
    return Corpus(train, code, heldout, take(train, CALIBRATION_BYTES))


def joined(some: list[Document]) -> str:
    return "\n\n\n".join(d.text for d in some) + "\n"


# tokenizer


def train_tokenizer(some: list[Document]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in some), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def stream_of(tokenizer: PreTrainedTokenizerFast, some: list[Document]) -> torch.Tensor:
    return torch.tensor([i for d in some for i in (tokenizer.bos_token_id, *encode(tokenizer, d.text))])


# model


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # on a CPU in bfloat16 faster than "sdpa"
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def curriculum(steps: int, code_share: float, generator: torch.Generator) -> list[tuple[str, int]]:
    """Per step what is read, and the length of its windows: code and documentation, then documentation in long ones."""
    chance = torch.rand(steps, generator=generator).tolist()
    return [
        (
            "code" if step < steps * CODE_UNTIL and chance[step] < code_share else "docs",
            SEQ_LEN // 2 if step < steps * SHORT_UNTIL else SEQ_LEN,
        )
        for step in range(steps)
    ]


def epochs(tokens: torch.Tensor, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless epochs of [windows, length] batches; every epoch cuts the stream at a new offset."""
    batch = STEP_TOKENS // length
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(tokens) - offset) // length
        windows = tokens[offset : offset + count * length].view(count, length)
        order = torch.randperm(count, generator=generator)
        yield from windows[order[: count // batch * batch]].split(batch)


def optimizer_for(model: LlamaForCausalLM, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: LlamaForCausalLM,
    streams: dict[str, torch.Tensor],
    plan: list[tuple[str, int]],
    generator: torch.Generator,
    learning_rate: float,
    weight_decay: float,
) -> None:
    steps = len(plan)
    warmup = steps // 20
    optimizer = optimizer_for(model, learning_rate, weight_decay)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = {(name, length): epochs(streams[name], length, generator) for name, length in sorted(set(plan))}
    recent = 0.0
    model.train()
    for step, kind in enumerate(plan, 1):
        batch = next(batches[kind])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent += loss.item()
        if step % 100 == 0:
            print(f"step {step} loss {recent / 100:.3f} CPU seconds {time.process_time():.0f}", flush=True)
            recent = 0.0
    model.eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Non-overlapping windows of 512 tokens, 511 predictions each; the rest of the text is left out."""
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    losses = []
    for window in windows.split(8):
        logits = model(window, use_cache=False).logits[:, :-1].float()
        losses.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        )
    return math.exp(torch.cat(losses).double().mean())


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=150, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(output[0], skip_special_tokens=True)


# writing


README = """# The embedded model

A Llama-style causal language model with {parameters:,} parameters, so that every example and every test of this project
runs offline. It writes text that looks like Python's documentation and knows nothing else.

| | |
|---|---|
| shape | {shape} |
| tokenizer | byte-level BPE, {vocab} tokens; `{end}` begins each document in training, is never added by itself |
| documentation | {docs_bytes:,} bytes, {docs_tokens:,} tokens, read {docs_read:.1f} times |
| code | {code_bytes:,} bytes, {code_tokens:,} tokens, read {code_read:.1f} times, only in the first {code_until:.0%} |
| steps | {steps} of {step_tokens} tokens; AdamW, weight decay {weight_decay}, cosine from {learning_rate}, no dropout |
| training time | {minutes:.1f} CPU minutes, {threads} thread(s) |
| held-out perplexity | **{ppl:.3f}**, float16 weights computed in float32; {bits_per_byte:.3f} bits per byte |
| perplexity of `calibration.txt` | {calibration_ppl:.3f} (training text) |

Held-out perplexity: `heldout.txt` as one text, no special tokens, {windows} non-overlapping windows of {seq} tokens,
{predictions} predictions each.

Made by `OMP_NUM_THREADS={threads} python scripts/train_embedded.py` with seed {seed}, Python {python}, torch {torch}.

## Data

`pydoc_data.topics` and the docstrings, with their signatures, of the standard library of Python {python}: read from
source with `ast`, never imported; without tests, idlelib, tkinter, lib2to3 and turtledemo. A document is one topic or
one module. Documents are ordered by the SHA-256 of their name; the first {heldout_documents} of at most {longest:,}
characters are held out (`heldout.txt`). From the rest, every paragraph is dropped that stands in an earlier document or
shares {shingle} successive words with held-out text. `calibration.txt` is the beginning of what remains. The source
code of the same modules is read as well, less the held-out modules and less such paragraphs.

## Licence

The text is Python's documentation and standard library, Copyright (c) 2001 Python Software Foundation, all rights
reserved, under the PSF License Version 2 (<https://docs.python.org/3/license.html>). `heldout.txt` and
`calibration.txt` are excerpts under that licence; changes made: docstrings set under their signatures, repeated
paragraphs left out. The weights derive from that text alone.
"""


def shape_of(config: LlamaConfig) -> str:
    return (
        f"hidden {config.hidden_size}, intermediate {config.intermediate_size}, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, {config.num_key_value_heads} key-value heads of {config.head_dim}, "
        f"context {config.max_position_embeddings}, tied embeddings"
    )


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write beside the final place and swap, so that a reader never sees half a model."""
    fresh, stale = out / "model.new", out / "model.old"
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    model.half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    if (out / "model").exists():
        (out / "model").rename(stale)
    fresh.rename(out / "model")
    shutil.rmtree(stale, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    path.with_suffix(".new").rename(path)


def main(
    out: Path = Path(__file__).parents[1] / "src/elastiq/embedded",
    steps: int = 2400,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.2,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Build the corpus, train the tokenizer and the model, write everything to OUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    corpus = split(documentation(), list(modules(UNSEEN_CODE)))
    tokenizer = train_tokenizer(corpus.train)
    streams = {"docs": stream_of(tokenizer, corpus.train), "code": stream_of(tokenizer, corpus.code)}
    print({name: len(tokens) for name, tokens in streams.items()}, "tokens", flush=True)

    model = new_model(tokenizer)
    plan = curriculum(steps, len(streams["code"]) / sum(map(len, streams.values())), generator)
    start = time.process_time()
    train(model, streams, plan, generator, learning_rate, weight_decay)
    minutes = (time.process_time() - start) / 60

    out.mkdir(parents=True, exist_ok=True)
    write_model(model, tokenizer, out)
    write_text(out / "heldout.txt", joined(corpus.heldout))
    write_text(out / "calibration.txt", joined(corpus.calibration))

    stored = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    stored_tokenizer = AutoTokenizer.from_pretrained(out / "model")
    heldout, calibration = (
        torch.tensor(encode(stored_tokenizer, joined(some))) for some in (corpus.heldout, corpus.calibration)
    )
    ppl = perplexity(stored, heldout)
    times_read = {
        name: sum(name == read for read, _ in plan) * STEP_TOKENS / len(tokens) for name, tokens in streams.items()
    }
    readme = README.format(
        parameters=stored.num_parameters(),
        shape=shape_of(stored.config),
        vocab=VOCAB_SIZE,
        end=END,
        docs_bytes=len(joined(corpus.train).encode()),
        docs_tokens=len(streams["docs"]),
        docs_read=times_read["docs"],
        code_bytes=len(joined(corpus.code).encode()),
        code_tokens=len(streams["code"]),
        code_read=times_read["code"],
        code_until=CODE_UNTIL,
        steps=steps,
        step_tokens=STEP_TOKENS,
        seq=SEQ_LEN,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
        minutes=minutes,
        threads=threads,
        ppl=ppl,
        bits_per_byte=math.log2(ppl) * len(heldout) / len(joined(corpus.heldout).encode()),
        calibration_ppl=perplexity(stored, calibration),
        windows=len(heldout) // SEQ_LEN,
        predictions=SEQ_LEN - 1,
        python=platform.python_version(),
        torch=torch.__version__,
        heldout_documents=len(corpus.heldout),
        longest=LONGEST_HELDOUT_DOCUMENT,
        shingle=SHINGLE,
    )
    write_text(out / "README.md", readme)
    print(readme)
    print(sample(stored, stored_tokenizer, "The with statement", seed))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
