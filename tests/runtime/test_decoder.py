"""The compiled way of a token gives what the modules give, or is not taken."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from tiny import make_model, make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

import elastiq
from elastiq.core import ElastiqError, Fold, Site
from elastiq.linalg import native
from elastiq.measure import inspect_checkpoint
from elastiq.parts import Diagonal, Hadamard
from elastiq.runtime import cache_argument, decoder, expected_way, plain, token_way, with_cache

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89]])
TOKENS = [79, 32, 38, 46, 26, 43]
PLAIN = ("llama", "qwen2", "qwen3")

pytestmark = pytest.mark.skipif(native.module is None, reason="compiled code is absent")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, bool], Path] = {}

    def checkpoint(family: str, embeddings: bool = True) -> Path:
        key = (family, embeddings)
        if key not in made:
            root = tmp_path_factory.mktemp(family)
            source = make_model(family, root / "model")
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            write_random(model, source, root / "nested", embeddings=embeddings)
            made[key] = root / "nested"
        return made[key]

    return checkpoint


@pytest.fixture
def llama(checkpoints: Any) -> Any:
    return elastiq.load(checkpoints("llama"), bits=4, max_bits=8)


@pytest.fixture(autouse=True)
def default_path() -> Iterator[None]:
    yield
    native.use(None)


@torch.no_grad()
def logits(model: Any, tokens: list[int] = TOKENS, cache: Any = None, **arguments: Any) -> Tensor:
    """[tokens, vocabulary] of `tokens` given one by one after the prompt."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(PROMPT, **with_cache(model, cache))
    rows = [model(torch.tensor([[token]]), **with_cache(model, cache), **arguments).logits[0, -1] for token in tokens]
    return torch.stack(rows)


def reference(model: Any, tokens: list[int] = TOKENS) -> Tensor:
    """The same from the modules alone, in plain torch."""
    native.use("torch")
    expected = logits(model, tokens)
    native.use(None)
    return expected


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() < 1e-3 * b.norm())


def step(model: Any) -> Any:
    return model.model.compiled_step


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("embeddings", [True, False])
def test_logits_are_those_of_the_modules(checkpoints: Any, family: str, embeddings: bool) -> None:
    model = elastiq.load(checkpoints(family, embeddings), bits=6)
    assert close(logits(model), reference(model))
    assert step(model).equal is False  # of the last run, in plain torch
    logits(model)
    assert step(model).equal


SIZES = [
    {"hidden_size": 64, "intermediate_size": 96},
    {"hidden_size": 48, "intermediate_size": 272, "num_attention_heads": 3, "num_key_value_heads": 3},
    {"hidden_size": 40, "intermediate_size": 37, "head_dim": 16},
]


def rotate(site: Site) -> tuple[Fold, ...]:
    return (Hadamard.of(torch.rand(site.shape[1], generator=torch.Generator().manual_seed(3)) < 0.5),)


def rotated(root: Path, size: dict[str, int], folds: Callable[[Site], tuple[Fold, ...]] = rotate) -> Any:
    source = make_model("llama", root / "model", **size)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    write_random(plain, source, root / "nested", folds=folds)
    return elastiq.load(root / "nested", bits=6)


@pytest.mark.parametrize("path", native.paths()[:-1])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['hidden_size']}-{size['intermediate_size']}")
def test_rotated_inputs(tmp_path: Path, size: dict[str, int], path: str) -> None:
    model = rotated(tmp_path, size)
    expected = reference(model)
    native.use(path)
    assert close(logits(model), expected)
    assert step(model).equal
    state = {name: x ^ 0x5A if name.endswith("signs") else x for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    assert close(logits(model), reference(model)) and not close(reference(model), expected)


@pytest.mark.parametrize("channels", [32, 128, 16])
def test_a_rotation_of_another_size_is_refused(tmp_path: Path, channels: int) -> None:
    fold = Hadamard.of(torch.arange(channels) % 3 == 0)
    with pytest.raises(ElastiqError, match=f"parts of the quantization_config .* {channels}"):
        rotated(tmp_path, SIZES[0], lambda site: (fold,))
    with pytest.raises(ElastiqError, match=f"rotation of {channels} channels was given 64"):
        fold.forward(torch.ones(2, 64))


def test_other_folds_keep_their_own_code(tmp_path: Path) -> None:
    def scaled(site: Site) -> tuple[Fold, ...]:
        return (Diagonal.of(torch.linspace(0.5, 2, site.shape[1])),) if site.name.endswith("down_proj") else ()

    def twice(site: Site) -> tuple[Fold, ...]:
        return 2 * rotate(site) if site.name.endswith("o_proj") else ()

    def unlike(site: Site) -> tuple[Fold, ...]:
        return rotate(site) if site.name.endswith("k_proj") else ()

    for index, folds in enumerate((scaled, twice, unlike)):
        model = rotated(tmp_path / str(index), SIZES[0], folds)
        assert not hasattr(model.model, "compiled_step")
        assert close(logits(model), reference(model))


@pytest.mark.parametrize("path", native.paths()[:-1])
@pytest.mark.parametrize("activations", ["int16", "float"])
def test_every_path(llama: Any, path: str, activations: str) -> None:
    expected = reference(llama)
    for matrix in llama.model.modules():
        if hasattr(matrix, "activations"):
            matrix.activations = activations
    native.use(path)
    assert close(logits(llama), expected)
    assert step(llama).equal


def test_a_long_past_and_threads(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    states = torch.randn(2, 1, 2, 241, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        cache.update(*states, layer)
    threads = torch.get_num_threads()
    logits(llama, TOKENS, copy.deepcopy(cache))  # the first token here is the modules', which it is compared with
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(logits(llama, TOKENS, copy.deepcopy(cache)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    native.use("torch")
    assert close(found[0], logits(llama, TOKENS, cache))


@pytest.mark.parametrize("heads", [8, 1])
def test_heads_of_other_sizes_keep_their_own_code(tmp_path: Path, heads: int) -> None:
    width = {8: 8, 1: 1024}[heads]
    size = {"hidden_size": 64, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": width}
    model = rotated(tmp_path, size, lambda site: ())
    assert close(logits(model), reference(model))
    reason = f"modules: its heads have {width} channels, and multiples of 16 up to 512 are known"
    assert token_way(model) == expected_way(model) == reason


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral", "phi3", "gpt2", "mixtral"])
def test_other_structures_keep_their_own_code(checkpoints: Any, family: str) -> None:
    model = elastiq.load(checkpoints(family, False), bits=4)
    assert not any(hasattr(module, "compiled_step") for module in model.modules())


def test_a_decoder_that_computes_something_else_is_found_out(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    block = type(llama.model.layers[0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, **kwargs: x + 1.1 * (forward(self, x, **kwargs) - x))
    found = logits(llama)
    assert step(llama).equal is False
    assert close(found, reference(llama))


def ministral(root: Path, **rope: Any) -> Any:
    """A tiny Ministral 3, whose queries grow by position with `llama_4_scaling_beta`, from position 32 on."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **rope}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 260, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None}
    config = AutoConfig.for_model("ministral3", **sizes, **heads, rope_parameters=parameters, sliding_window=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    write_random(model, root / "model", root / "nested")
    return elastiq.load(root / "nested", bits=8)


LONG = torch.arange(70) * 37 % 256


def test_what_scales_by_position_is_refused_by_its_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoder._say_once.cache_clear()
    caplog.set_level("INFO", "elastiq")
    for _ in range(2):
        model = ministral(tmp_path / str(_), llama_4_scaling_beta=0.5)
        assert not hasattr(model.model, "compiled_step")
    sentence = (
        "Ministral3Model: single tokens take its modules, not compiled code: its configuration has "
        "rope_parameters.llama_4_scaling_beta=0.5, which may scale by position or magnitude"
    )
    assert [record.message for record in caplog.records].count(sentence) == 1
    assert token_way(model) == "modules: " + sentence.split("code: ")[1]
    plain = ministral(tmp_path / "plain", llama_4_scaling_beta=0)
    assert token_way(plain) == "compiled code"


def test_both_ways_are_compared_at_every_doubling_of_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plain, "_scaled", lambda config: None)
    model = ministral(tmp_path, llama_4_scaling_beta=0.5)
    expected = reference(model, LONG.tolist())
    found = logits(model, LONG[:24].tolist())  # up to position 30
    assert step(model).equal and step(model)._compared == {3, 4, 5}
    assert close(logits(model, LONG.tolist()), expected)
    assert step(model).equal is False
    (warning,) = [record.message for record in caplog.records if record.name == "elastiq"]
    assert re.search(r"Ministral3Model: .* at position 32 the two differ by 0\.\d+ of the values", warning)
    assert close(found, expected[:24])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attn_temperature_tuning", True), ("floor_scale", 8192), ("attn_scale", 0.1), ("clip_qkv", 6.0),
        ("attn_logit_softcapping", 50.0), ("logits_scaling", 8.0), ("attention_multiplier", 0.5), ("swiglu_limit", 7.0),
        ("log_scaling_alpha", 0.1), ("attention_chunk_size", 64), ("no_rope_layers", [1, 0]), ("sink_tokens", 4),
    ],
)  # fmt: skip
def test_settings_that_may_scale_are_named(llama: Any, setting: str, value: object) -> None:
    assert plain.objection(llama.model) is None
    setattr(llama.model.config, setting, value)
    reason = f"its configuration has {setting}={value!r}, which may scale by position or magnitude"
    assert plain.objection(llama.model) == reason
    setattr(llama.model.config, setting, None)
    assert plain.objection(llama.model) is None


def test_a_forward_with_other_names_is_said_aloud(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from_before = type(elastiq.load(checkpoints("llama")).model)
    forward = from_before.forward

    def renamed(self: Any, input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **rest)

    decoder._say_once.cache_clear()
    monkeypatch.setattr(from_before, "forward", renamed)
    model = elastiq.load(checkpoints("llama"))
    (sentence,) = [record.message for record in caplog.records]
    assert "LlamaModel: single tokens take its modules, not compiled code: its forward has no argument" in sentence
    assert "inputs_embeds and no position_ids" in sentence
    assert token_way(model).startswith("modules: its forward has no argument")


def test_the_cache_is_found_by_annotation_then_by_name() -> None:
    def now(self: Any, input_ids: Any, use_cache: bool, cache: Cache | None = None) -> None: ...
    def before(self: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...
    def some_day(self: Any, states: Cache | None = None) -> None: ...
    def never(self: Any, input_ids: Any = None, use_cache: bool = False) -> None: ...

    assert [cache_argument(one) for one in (now, before, some_day, never)] == [
        "cache", "past_key_values", "states", None
    ]  # fmt: skip


def test_no_warning_of_a_library_is_seen(llama: Any) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert len(list(elastiq.generate(llama, PROMPT, max_new_tokens=4, stop=()))) == 4
        llama.generate(PROMPT, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert not [str(warning.message) for warning in seen]
    assert step(llama).equal


def test_positional_arguments_and_an_answer_as_the_modules_give_it(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        logits(llama, cache=cache)
        token = torch.tensor([[5]])
        fast = llama.model(token, **with_cache(llama.model, cache))
        assert step(llama).equal
        cache.crop(-1)
        native.use("torch")
        slow = llama.model(token, **with_cache(llama.model, cache))
    assert type(fast) is type(slow) and list(fast.keys()) == list(slow.keys())
    assert close(fast.last_hidden_state, slow.last_hidden_state)
    assert all(value is cache for name, value in fast.items() if name != "last_hidden_state")


def test_a_checkpoint_tells_the_way_before_its_planes_are_read(checkpoints: Any, tmp_path: Path) -> None:
    rotated(tmp_path, SIZES[0])
    for path, way in ((checkpoints("llama"), "compiled code"), (tmp_path / "nested", "compiled code")):
        assert inspect_checkpoint(path)["tokens"] == way
    assert inspect_checkpoint(checkpoints("gemma2", False))["tokens"].startswith("modules: in block 0 ")


def test_the_way_of_tokens_is_told(llama: Any, checkpoints: Any) -> None:
    assert token_way(llama) == expected_way(llama) == "compiled code"
    assert token_way(elastiq.load(checkpoints("gpt2", False))) == "modules: it has no decoder of the kind of Llama"
    assert token_way(elastiq.load(checkpoints("mistral", False))) == (
        "modules: its attention has a window (sliding_window=8)"
    )
    native.use("torch")
    assert token_way(llama) == "modules: the path in use is plain torch"


def test_a_cache_of_inference_mode_goes_on_outside_of_it(llama: Any) -> None:
    expected = reference(llama)
    for path in (None, "torch"):
        native.use(path)
        cache = DynamicCache(config=llama.config)
        with torch.inference_mode():
            llama(PROMPT, **with_cache(llama, cache))
            rows = [llama(torch.tensor([[token]]), **with_cache(llama, cache)).logits[0, -1] for token in TOKENS[:2]]
        rows += [llama(torch.tensor([[token]]), **with_cache(llama, cache)).logits[0, -1] for token in TOKENS[2:]]
        assert close(torch.stack(rows), expected)


def test_two_threads_read_the_rotary_table_at_their_own_positions(llama: Any) -> None:
    logits(llama)
    compiled = step(llama)
    tables = {}
    for position in (5, 2000):
        cosine, sine = llama.model.rotary_emb(torch.empty(1), torch.tensor([[position]]))
        tables[position] = cosine[0, 0], sine[0, 0]

    def read(position: int) -> bool:
        found = [compiled._turn(torch.empty(1), position) for _ in range(200)]
        return all(torch.equal(a, b) for pair in found for a, b in zip(pair, tables[position], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [5, 2000] * 4))


def test_a_changed_model_is_compiled_anew(llama: Any) -> None:
    before = logits(llama)
    first = step(llama)
    assert close(logits(llama), before) and step(llama) is first
    elastiq.set_bits(llama, 2)
    assert close(logits(llama), reference(llama)) and not close(logits(llama), before)
    elastiq.set_bits(llama, {"model.layers.1.mlp.down_proj": 8, "model.layers.0.self_attn.k_proj": 1})
    assert close(logits(llama), reference(llama))
    llama.model.layers[0].input_layernorm.weight = torch.nn.Parameter(torch.full((64,), 0.3), requires_grad=False)
    assert close(logits(llama), reference(llama))
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight.mul_(2)
    assert close(logits(llama), reference(llama))


def test_planes_exchanged_or_moved_are_noticed(llama: Any, checkpoints: Any) -> None:
    other = elastiq.load(checkpoints("llama"), bits=8)
    before = logits(llama)
    with torch.no_grad():
        for norm in (module for module in other.modules() if type(module).__name__.endswith("Norm")):
            norm.weight.mul_(1.5)
        other.model.layers[0].mlp.gate_proj.read_arrays()[0].bitwise_not_()
    llama.load_state_dict(other.state_dict(), assign=True)
    after = logits(llama)
    assert close(after, reference(llama)) and not close(after, before)
    first = step(llama)
    llama.model.layers[1].self_attn.q_proj.read_arrays()[0].share_memory_()
    assert close(logits(llama), after) and step(llama) is not first


def test_hooks_and_strange_modules_are_called(llama: Any) -> None:
    expected = logits(llama)
    seen = []
    handle = llama.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(1))
    assert close(logits(llama), expected) and len(seen) == 1 + len(TOKENS)
    handle.remove()
    inner = llama.model.layers[0].mlp.up_proj
    llama.model.layers[0].mlp.up_proj = torch.nn.Sequential(inner, torch.nn.Tanh())
    changed = logits(llama)
    assert not close(changed, expected) and close(changed, reference(llama))


def test_arguments_beyond_a_token_are_answered(llama: Any) -> None:
    expected = logits(llama)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(PROMPT, **with_cache(llama, cache))
        token = torch.tensor([TOKENS[:1]])
        mask = torch.ones(1, 8, dtype=torch.long)
        hidden = llama(token, **with_cache(llama, cache), attention_mask=mask, output_hidden_states=True)
        assert len(hidden.hidden_states) == 3
        cache.crop(-1)
        assert isinstance(llama(token, **with_cache(llama, cache), return_dict=False), tuple)
        cache.crop(-1)
        embedded = llama.model.embed_tokens(token)
        assert close(llama(inputs_embeds=embedded, **with_cache(llama, cache)).logits[0], expected[:1])
        cache.crop(-1)
        mask[0, :3] = 0
        native.use("torch")
        masked = llama(token, **with_cache(llama, cache), attention_mask=mask).logits
        native.use(None)
        cache.crop(-1)
        assert close(llama(token, **with_cache(llama, cache), attention_mask=mask).logits, masked)
        assert not close(masked[0], expected[:1])


def test_what_is_not_finite_stays_so(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    logits(llama, cache=cache)
    embedded = llama.model.embed_tokens(torch.tensor([[5]])).clone()
    embedded[0, 0, 3] = float("nan")
    with torch.no_grad():
        assert llama(inputs_embeds=embedded, **with_cache(llama, cache)).logits.isnan().all()


def test_generate_of_transformers_goes_through_it(llama: Any) -> None:
    ours = list(elastiq.generate(llama, PROMPT, max_new_tokens=20, stop=()))
    assert step(llama).equal
    theirs = llama.generate(PROMPT, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs[0, PROMPT.shape[1] :].tolist() == ours
    beams = llama.generate(PROMPT, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert beams.shape == (1, 13)


def test_copies_have_their_own(llama: Any) -> None:
    expected = logits(llama)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama.model))):
        decoder = getattr(twin, "model", twin)
        assert decoder.compiled_step is None
        for parameter in decoder.parameters():
            parameter.zero_()
        assert close(logits(llama), expected)


def test_the_boundary_refuses_what_it_cannot_hold(llama: Any) -> None:
    logits(llama)
    compiled = step(llama)._compiled
    path = native.current()
    with pytest.raises(ValueError, match="no room for a token"):
        compiled.step(path, 2, [1, 1, 1, 1], [8, 8], 8, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="keys and values of every block"):
        compiled.step(path, 2, [1, 1], [8], 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="multiples of 16 channels"):
        native.module.Decoder([4, 2, 24, 24], 1.0, 64, 96, 1e-5, 1, [])  # type: ignore[union-attr]
    block = llama.model.layers[0]
    matrices = [getattr(block.self_attn, f"{name}_proj") for name in "qkvo"]
    matrices += [getattr(block.mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    handles = tuple((matrix.tiled().handle, 0) for matrix in matrices)
    for rotation in ((1, 1, 48), (1, 1, 0), (1, 0, 16), (1, 1, 128)):
        described = (0, 0, 0, 0), handles, ((0, 0, 0), rotation, (0, 0, 0), (0, 0, 0))
        with pytest.raises(ValueError, match="power of two"):
            native.module.Decoder([4, 2, 16, 16], 1.0, 64, 96, 1e-5, 1, [described])  # type: ignore[union-attr]
