"""Windows of tokens, and hidden states that flow through a model one block at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastiq.core import ElastiqError, Stats, TokenWeights
from elastiq.embedded import calibration_text
from elastiq.models import Layout, ModelSource, build_skeleton, discover
from elastiq.pipeline import stream as stream_module
from elastiq.pipeline.stream import BlockStream
from elastiq.text.calibration import calibration_ids
from elastiq.token_weights import BlockOutput

NEEDS = frozenset({"hessian", "abs_max"})
TEXT = "".join(f"{number}: the quick brown fox jumps over {number * 7919 % 1000} lazy dogs.\n" for number in range(200))


# Token windows


def encode(text: str) -> list[int]:
    return tiny.make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def windows(text: str, num_samples: int, seq_len: int) -> Tensor:
    ids = torch.tensor(encode(text))
    count = min(num_samples, len(ids) // seq_len)
    return ids[: count * seq_len].view(count, seq_len)


@pytest.mark.parametrize("num_samples", [1, 5, 1000])
def test_windows_are_consecutive_from_the_start(num_samples: int, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    for calibration in (file, str(file), [TEXT], [file]):
        ids = calibration_ids(calibration, tiny.make_tokenizer(), num_samples, 32)
        assert ids.dtype == torch.long
        assert torch.equal(ids, windows(TEXT, num_samples, 32))


def test_no_more_text_is_read_than_needed_and_none_is_lost() -> None:
    rare = "é" * 40 + "x" * 5000  # 2 bytes and so 2 tokens per character at first
    assert torch.equal(calibration_ids([rare], tiny.make_tokenizer(), 2, 32), windows(rare, 2, 32))
    assert torch.equal(calibration_ids([rare], tiny.make_tokenizer(), 50, 32), windows(rare, 50, 32))


def test_texts_files_and_records_join_by_blank_lines(tmp_path: Path) -> None:
    lines = [{"text": "a first text"}, {"messages": [{"role": "user", "content": "hello"}]}, {"text": "a third"}]
    file = tmp_path / "records.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    joined = "a first text\n\n<user>hello\n\n\na third"
    for calibration in (file, lines):
        assert torch.equal(calibration_ids(calibration, tiny.make_tokenizer(), 9, 8), windows(joined, 9, 8))
    mixed = calibration_ids(["zero", file, lines[0]], tiny.make_tokenizer(), 99, 8)
    assert torch.equal(mixed, windows(f"zero\n\n{joined}\n\na first text", 99, 8))


def test_default_is_the_embedded_text() -> None:
    ids = calibration_ids(None, tiny.make_tokenizer(), 3, 64)
    assert torch.equal(ids, windows(calibration_text()[:1000], 3, 64))


def test_token_ids_pass_through() -> None:
    flat = torch.arange(70, dtype=torch.int32)
    assert torch.equal(calibration_ids(flat, None, 9, 32), torch.arange(64).view(2, 32))
    matrix = torch.arange(200).view(5, 40)
    assert torch.equal(calibration_ids(matrix, None, 3, 32), matrix[:3, :32])


def test_calibration_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()

    def refused(calibration: Any, sentence: str, tokenizer: Any = tokenizer) -> None:
        with pytest.raises(ElastiqError, match=sentence):
            calibration_ids(calibration, tokenizer, 4, 32)

    def file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    refused(["short"], "5 tokens are less than one window of 32; give a longer text or a smaller seq_len")
    refused([], "0 tokens are less than one window of 32")
    refused(torch.arange(5), "5 tokens are less than one window of 32")
    refused(torch.zeros(64), "token ids must be whole numbers")
    refused(["some text"], "text needs a tokenizer; give a tensor of token ids instead", tokenizer=None)
    refused(file("table.parquet", b"PAR1"), r"calibration reads \.txt, \.md and \.jsonl files, not '\.parquet'")
    refused(tmp_path / "absent.txt", r"calibration: .*absent\.txt cannot be read \(No such file or directory\)")
    refused(file("latin.txt", b"\xff\xfe\xfa"), r"calibration: .*latin\.txt is not UTF-8; convert it first")
    refused(file("a.jsonl", '{"text": "fine"}\n\n{"text": '), r"a\.jsonl, line 3, is not valid JSON")
    refused(file("b.jsonl", '{"text": "fine"}\n{"txt": "?"}'), r"b\.jsonl, line 2: a record is .*messages")
    refused(file("c.jsonl", "[1, 2]"), r"c\.jsonl, line 1: a record is")
    refused([{"prompt": "?"}], "calibration record 0: a record is")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    chat = [{"messages": [{"role": "user", "content": "hello"}]}]
    refused(chat, "calibration record 0: the chat template cannot render these messages \\(no such role\\); mend them")
    tokenizer.chat_template = None
    refused(chat, "no chat template to render messages with")


# Hidden states through the blocks


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of 24 at a time, so that five windows are two full batches and a smaller one."""
    monkeypatch.setattr(stream_module, "TOKENS_PER_BATCH", 48)


def tokens(count: int = 5, seq_len: int = 24) -> Tensor:
    return torch.randint(3, tiny.VOCAB - 10, (count, seq_len), generator=torch.Generator().manual_seed(1))


def stream_of(
    directory: Path, ids: Tensor | None = None, **options: Any
) -> tuple[BlockStream, Layout, PreTrainedModel]:
    source = ModelSource(directory)
    model = build_skeleton(source, options.get("dtype", torch.float32))
    layout = discover(model)
    options = {"needs": NEEDS, **options}
    return BlockStream(model, source, layout, tokens() if ids is None else ids, **options), layout, model


def whole_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()


def batches(ids: Tensor) -> Iterator[Tensor]:
    return iter(ids.split(2))


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).logits for part in batches(ids)])


@pytest.mark.parametrize("token_weights", [None, BlockOutput()], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streaming_equals_the_whole_model(
    family: str, token_weights: TokenWeights | None, tiny_model: Callable[[str], Path]
) -> None:
    stream, layout, model = stream_of(tiny_model(family), token_weights=token_weights)
    expected = whole_model(tiny_model(family))
    weights = expected.state_dict()
    for block, name in enumerate(layout.blocks):
        ours = stream.weights(block)
        for site in layout.at(block):
            stored = weights[site.tensor] if site.expert is not None else weights[f"{site.name}.weight"]
            stored = stored[site.expert] if site.expert is not None else stored
            assert torch.equal(ours[site.name], stored.T if site.role == "conv1d" else stored)
        if block != 1:
            stream.collect(block)
        stream.advance(block)
        assert all(parameter.is_meta for parameter in model.parameters()), name
    assert torch.equal(torch.cat(list(stream.logits())), logits_of(expected, tokens()))
    assert all(parameter.is_meta for parameter in model.parameters())


def naive_inputs(model: PreTrainedModel, layout: Layout, ids: Tensor) -> dict[str, Tensor]:
    """Site -> all rows that reach it in the whole model; of an expert, worked out from its router's choices."""
    rows: dict[str, list[Tensor]] = {site.name: [] for site in layout.sites}

    def of_layer(name: str) -> Callable[..., None]:
        return lambda module, args: rows[name].append(args[0].detach().flatten(0, -2))

    def of_experts(name: str) -> Callable[..., None]:
        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            hidden, chosen = args[0].flatten(0, -2), args[1]
            for expert in range(module.num_experts):
                x = hidden[(chosen == expert).any(dim=-1)]
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                rows[f"{name}.gate_up_proj.{expert}"].append(x)
                rows[f"{name}.down_proj.{expert}"].append(module.act_fn(gate) * up)

        return note

    for name, module in model.named_modules():
        if name in rows:
            module.register_forward_pre_hook(of_layer(name))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(of_experts(name))
    logits_of(model, ids)
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "mixtral", "qwen3_moe"])
def test_statistics_equal_those_of_the_whole_model(family: str, tiny_model: Callable[[str], Path]) -> None:
    stream, layout, _ = stream_of(tiny_model(family))
    expected = naive_inputs(whole_model(tiny_model(family)), layout, tokens())
    for block in range(len(layout.blocks)):
        collected = stream.collect(block)
        assert collected.keys() == {site.name for site in layout.at(block)}
        for site in layout.at(block):
            stats, x = collected[site.name], expected[site.name]
            assert stats is collected[site.input_id]
            assert stats.count == len(x)
            torch.testing.assert_close(stats.sums["hessian"], x.T @ x, rtol=1e-4, atol=1e-4)
            if len(x):
                torch.testing.assert_close(stats.sums["abs_max"], x.abs().amax(dim=0), rtol=1e-4, atol=1e-5)
        stream.advance(block)


def test_tokens_per_expert_add_up(tiny_model: Callable[[str], Path]) -> None:
    stream, _, _ = stream_of(tiny_model("mixtral"))
    collected = stream.collect(0)
    for name in ("gate_up_proj", "down_proj"):
        counts = [collected[f"model.layers.0.mlp.experts.{name}.{expert}"].count for expert in range(4)]
        assert sum(counts) == 2 * tokens().numel()


def test_only_the_statistics_asked_for_are_kept(tiny_model: Callable[[str], Path]) -> None:
    stream, _, _ = stream_of(tiny_model("llama"), needs=frozenset({"diagonal"}))
    for stats in stream.collect(0).values():
        assert set(stats.sums) == {"diagonal"}


def test_input_of_the_head(tiny_model: Callable[[str], Path]) -> None:
    for family in ("llama", "gemma2", "opt"):
        stream, layout, _ = stream_of(tiny_model(family))
        for block in range(len(layout.blocks)):
            stream.advance(block)
        rows: list[Tensor] = []
        model = whole_model(tiny_model(family))
        model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(args[0].flatten(0, 1))
        )
        logits_of(model, tokens())
        x = torch.cat(rows)
        stats = stream.final_stats()
        assert stats.count == len(x)
        torch.testing.assert_close(stats.sums["hessian"], x.T @ x, rtol=1e-4, atol=1e-4)


def test_embedding_and_head_weights(tiny_model: Callable[[str], Path]) -> None:
    stream, _, model = stream_of(tiny_model("llama"))
    weights, expected = stream.weights(-1), whole_model(tiny_model("llama"))
    assert list(weights) == ["model.embed_tokens", "lm_head"]
    assert torch.equal(weights["model.embed_tokens"], expected.get_input_embeddings().weight)
    assert torch.equal(weights["lm_head"], expected.get_output_embeddings().weight)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_replaced_weights_feed_the_next_block(family: str, tiny_model: Callable[[str], Path]) -> None:
    stream, layout, _ = stream_of(tiny_model(family))
    changed = whole_model(tiny_model(family))
    state = changed.state_dict()
    for block in range(len(layout.blocks)):
        weights = stream.weights(block)
        replaced = {name: (weight * 8).round() / 8 for name, weight in weights.items()}
        stream.collect(block)
        for site in layout.at(block):
            target = state[site.tensor][site.expert] if site.expert is not None else state[f"{site.name}.weight"]
            target.copy_(replaced[site.name].T if site.role == "conv1d" else replaced[site.name])
        stream.advance(block, replaced)
    got, unchanged = torch.cat(list(stream.logits())), logits_of(whole_model(tiny_model(family)), tokens())
    assert torch.equal(got, logits_of(changed, tokens()))
    assert not torch.allclose(got, unchanged)


def test_looking_at_weights_does_not_change_the_model(tiny_model: Callable[[str], Path]) -> None:
    stream, layout, _ = stream_of(tiny_model("llama"))
    for block in range(len(layout.blocks)):
        for weight in stream.weights(block).values():
            weight.zero_()
        stream.advance(block)
    assert torch.equal(torch.cat(list(stream.logits())), logits_of(whole_model(tiny_model("llama")), tokens()))


def test_hidden_states_in_a_file_are_the_same(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def final_hessian(**options: Any) -> tuple[Tensor, BlockStream]:
        stream, layout, _ = stream_of(tiny_model("llama"), **options)
        for block in range(len(layout.blocks)):
            stream.collect(block)
            stream.advance(block)
        hessian = stream.final_stats().get("hessian")
        assert hessian is not None
        return hessian, stream

    with caplog.at_level("INFO", "elastiq"):
        in_memory, _ = final_hessian()
        assert not caplog.messages
        spilled, stream = final_hessian(spill_dir=tmp_path, memory_limit=1000)
    assert str(tmp_path) in caplog.text
    assert torch.equal(in_memory, spilled)
    assert not list(tmp_path.iterdir()), "the file has no name, so that it cannot outlive the process"
    del stream


def test_no_room_for_hidden_states(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream_module.os, "posix_fallocate", full)
    with pytest.raises(ElastiqError, match=r"no room for 0 MB of hidden states .*No space left.*; free some space"):
        stream_of(tiny_model("llama"), spill_dir=tmp_path, memory_limit=1000)


def test_rows_that_are_not_finite_are_dropped_and_counted(tiny_model: Callable[[str], Path]) -> None:
    stream, _, _ = stream_of(tiny_model("llama"))
    stream._inputs[1, 20] = float("inf")
    collected = stream.collect(0)
    stats = collected["model.layers.0.self_attn.q_proj"]
    assert (stats.count, stats.dropped) == (5 * 24 - 1, 1)
    down = collected["model.layers.0.mlp.down_proj"]
    assert (down.count, down.dropped) == (4 * 24, 24), "attention spreads it over its window"
    assert all(bool(torch.isfinite(s.sums["hessian"]).all()) for s in collected.values() if "hessian" in s.sums)


def test_half_precision_arithmetic(tiny_model: Callable[[str], Path]) -> None:
    stream, layout, _ = stream_of(tiny_model("llama"), dtype=torch.bfloat16)
    for block in range(len(layout.blocks)):
        stats: dict[str, Stats] = stream.collect(block)
        assert all(s.sums["hessian"].dtype == torch.float32 for s in stats.values())
        assert all(weight.dtype == torch.float32 for weight in stream.weights(block).values())
        stream.advance(block)
    expected = logits_of(whole_model(tiny_model("llama")), tokens())
    assert (torch.cat(list(stream.logits())).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_ids_that_do_not_fit_the_model(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(ElastiqError, match="windows of 300 tokens exceed the model's 256 positions"):
        stream_of(tiny_model("llama"), tokens(1, 300))
    with pytest.raises(ElastiqError, match="the token id 260 is not among the 260 rows of the model's embedding"):
        stream_of(tiny_model("llama"), torch.full((1, 8), 260))
    with pytest.raises(ElastiqError, match="with at least one window"):
        stream_of(tiny_model("llama"), torch.empty(0, 8, dtype=torch.long))


def test_blocks_come_in_order(tiny_model: Callable[[str], Path]) -> None:
    stream, _, _ = stream_of(tiny_model("llama"))
    with pytest.raises(ValueError, match="the stream is at block 0, not 1"):
        stream.collect(1)
    with pytest.raises(ValueError, match="the stream is at block 0, not 2"):
        next(stream.logits())


# Models whose blocks return more than hidden states, or are not a plain chain


@pytest.fixture
def patched_model(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., BlockStream]:
    """A stream over a llama whose inner forward pass is `forward(model, hidden)` around the real embedding."""

    def make(forward: Callable[[Any, Tensor, Tensor], Tensor]) -> BlockStream:
        source = ModelSource(tiny_model("llama"))
        model = build_skeleton(source, torch.float32)
        layout = discover(model)
        inner = model.model

        def run(input_ids: Tensor, **kwargs: Any) -> Any:
            hidden = inner.embed_tokens(input_ids)
            positions = inner.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])

            def call(index: int, x: Tensor, **more: Any) -> Any:
                return inner.layers[index](x, position_embeddings=positions, **more)

            head = model.lm_head(inner.norm(forward(call, hidden, input_ids)))
            return type("Output", (), {"logits": head})

        monkeypatch.setattr(model, "forward", run)
        return BlockStream(model, source, layout, tokens(), NEEDS)

    return make


def test_blocks_that_return_tuples(patched_model: Callable[..., BlockStream]) -> None:
    assert patched_model(lambda call, x, ids: call(1, call(0, x)[0])[0])._more == ()

    def unpack(call: Any, x: Tensor, ids: Tensor) -> Tensor:
        x, _ = call(0, x)
        x, _ = call(1, x)
        return x

    assert len(patched_model(unpack)._more or ()) == 1


def hand_over_more(call: Callable[..., Any], hidden: Tensor) -> Tensor:
    hidden, first_value = call(0, hidden)
    hidden, _ = call(1, hidden, first_value=first_value)
    return hidden


@pytest.mark.parametrize(
    "forward",
    [
        lambda call, x, ids: call(1, call(0, x) + 1),
        lambda call, x, ids: call(0, call(1, x)),
        lambda call, x, ids: call(1, call(0, call(1, call(0, x)))),
        lambda call, x, ids: call(0, x),
        lambda call, x, ids: hand_over_more(call, x),
    ],
)
def test_blocks_that_are_no_plain_chain_are_refused(
    forward: Callable[..., Tensor], patched_model: Callable[..., BlockStream]
) -> None:
    with pytest.raises(ElastiqError, match="LlamaForCausalLM cannot be calibrated block by block: its blocks do not"):
        patched_model(forward)


def test_arguments_that_depend_on_the_text_are_refused(patched_model: Callable[..., BlockStream]) -> None:
    with pytest.raises(ElastiqError, match="what its blocks are given depends on the text"):
        patched_model(lambda call, x, ids: call(1, call(0, x, ids=ids), ids=ids))


# Memory

MEASURE = """
import re, sys, torch
from pathlib import Path
from elastiq.pipeline.stream import BlockStream
from elastiq.models import ModelSource, build_skeleton, discover
source = ModelSource(Path(sys.argv[1]))
model = build_skeleton(source, torch.float32)
layout = discover(model)
ids = torch.arange(4 * 32).view(4, 32)
stream = BlockStream(model, source, layout, ids, frozenset({"hessian"}))
for block in range(len(layout.blocks)):
    weights, stats = stream.weights(block), stream.collect(block)
    total = sum(float(weights[name].sum()) for name in weights)
    print(int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
    del weights, stats
    stream.advance(block)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux reports it")
def test_memory_is_flat_over_blocks(tmp_path: Path) -> None:
    """Megabytes held while a block and its statistics are; 12 blocks of 4.2 MB each are 50 MB if they stay."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_key_value_heads": 4}
    directory = tiny.make_model("llama", tmp_path, **sizes)
    command = [sys.executable, "-c", MEASURE, str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    held = [int(line) for line in result.stdout.split()]
    assert len(held) == 12
    assert held[-1] - held[1] <= 8, held


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_token_weights_are_the_gradients_of_the_blocks_output(family: str, tiny_model: Callable[[str], Path]) -> None:
    """Against the whole model in one graph: gradients of block 1's output times the same random direction."""
    source = ModelSource(tiny_model(family))
    skeleton = build_skeleton(source, torch.float32)
    layout = discover(skeleton)
    ids = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(3))
    stream = BlockStream(skeleton, source, layout, ids, frozenset({"hessian"}), token_weights=BlockOutput())
    stream.advance(0)
    found = stream.collect(1)

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    outputs: list[torch.Tensor] = []
    for site in layout.at(1):
        model.get_submodule(site.name).register_forward_hook(
            lambda module, args, y, name=site.name: seen.__setitem__(name, (args[0], y))
        )
    model.get_submodule(layout.blocks[1]).register_forward_hook(
        lambda module, args, y: outputs.append(y if isinstance(y, torch.Tensor) else y[0])
    )
    model(input_ids=ids)
    direction = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(outputs[0], [y for _, y in seen.values()], direction)
    for (name, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
        rows, weights = x.detach().flatten(0, 1).double(), gradient.flatten(0, 1).double().square().sum(dim=1)
        expected = (rows * weights[:, None]).T @ rows / weights.sum()
        torch.testing.assert_close(found[name].mean_hessian().double(), expected, rtol=1e-3, atol=1e-6)
