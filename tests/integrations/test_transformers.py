"""Nested checkpoints as transformers loads, saves and runs them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_checkpoint import write_random
from tiny import build_model, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import elastiq
from elastiq import ElastiqConfig, ElastiqError, set_bits
from elastiq.runtime import NestedEmbedding, TiedHead, nested_matrices, with_cache

IDS = torch.arange(40).reshape(2, 20) * 3

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Callable[..., Path]:
    made: dict[tuple[str, bool], Path] = {}

    def get(family: str = "llama", embeddings: bool = False) -> Path:
        if (family, embeddings) not in made:
            output = tmp_path_factory.mktemp("nested") / family
            write_random(build_model(family), tiny_model(family), output, embeddings=embeddings)
            made[family, embeddings] = output
        return made[family, embeddings]

    return get


def load(path: Path, bits: object = None, **kwargs: object) -> object:
    settings = {} if bits is None else {"quantization_config": ElastiqConfig(bits=bits)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **settings, **kwargs)


def logits(model: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "embeddings"),
    [("llama", False), ("qwen3", True), ("gemma3", True), ("gpt2", True), ("mixtral", False), ("qwen3_moe", True)],
)
def test_equals_elastiq_load(checkpoint: Callable[..., Path], family: str, embeddings: bool) -> None:
    path = checkpoint(family, embeddings)
    model = load(path)
    assert torch.equal(logits(model), logits(elastiq.load(path)))
    assert {m.max_bits for m in nested_matrices(model).values()} == {8}
    set_bits(model, 3)
    assert torch.equal(logits(model), logits(elastiq.load(path, 3)))


def test_width_at_load_reads_only_its_planes_and_more_later(checkpoint: Callable[..., Path]) -> None:
    model = load(checkpoint(), 3)
    assert {m.max_bits for m in nested_matrices(model).values()} == {3}
    assert torch.equal(logits(model), logits(elastiq.load(checkpoint(), 3)))
    set_bits(model, 6)
    assert torch.equal(logits(model), logits(elastiq.load(checkpoint(), 6)))


def test_map_of_widths(checkpoint: Callable[..., Path]) -> None:
    widths = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 3}
    assert torch.equal(logits(load(checkpoint(), widths)), logits(elastiq.load(checkpoint(), widths)))


@pytest.mark.parametrize(
    ("bits", "message"),
    [(9, "can be read at 1, 2, 3, 4, 5, 6, 7, 8 bits, not 9"), ({"model.nothing": 2}, "model.nothing: no quantized")],
)
def test_refused_widths(checkpoint: Callable[..., Path], bits: object, message: str) -> None:
    with pytest.raises(ElastiqError, match=message):
        load(checkpoint(), bits)


@pytest.mark.parametrize(
    ("family", "embeddings"), [("llama", False), ("gemma3", True), ("gpt2", False), ("qwen3_moe", False)]
)
def test_saved_and_loaded_again(checkpoint: Callable[..., Path], tmp_path: Path, family: str, embeddings: bool) -> None:
    model = load(checkpoint(family, embeddings), 4)
    set_bits(model, 3)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    set_bits(again, 4)
    assert torch.equal(logits(again), logits(elastiq.load(checkpoint(family, embeddings), 4)))
    with pytest.raises(ElastiqError, match="5 bits were asked for, the planes held give 1, 2, 3, 4"):
        set_bits(again, 5)
    assert {m.bits for m in nested_matrices(again).values()} == {4}
    with pytest.raises(ElastiqError, match=r"model\.nothing: no quantized matrix of this model"):
        set_bits(again, {"model.nothing": 2})


def test_what_was_saved_is_loaded_by_elastiq(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "qwen3_moe"):
        path, saved = checkpoint(family), tmp_path / family
        load(path, 4).save_pretrained(saved, max_shard_size="50KB")
        assert len(list(saved.glob("*.safetensors"))) > 1
        assert torch.equal(logits(elastiq.load(saved)), logits(elastiq.load(path, 4)))
        model = elastiq.load(saved, 3)
        assert torch.equal(logits(model), logits(elastiq.load(path, 3)))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        set_bits(model, 4)
        assert torch.equal(logits(model), logits(elastiq.load(path, 4)))
    saved = tmp_path / "llama"
    for settings, message in (
        ({"bits": 5}, "5 bits were asked for, the planes held give 1, 2, 3, 4"),
        ({"bits": 3.5}, "saved without its level table; give a width or a level map"),
        ({"memory": "1GB"}, "saved without its level table"),
        ({"max_bits": 6}, "it holds 4 planes, not 6"),
        ({"bits": {"model.nothing": 2}}, r"model\.nothing: no quantized matrix"),
    ):
        with pytest.raises(ElastiqError, match=message):
            elastiq.load(saved, **settings)
    shard = max(saved.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ElastiqError, match="cut short"):
        elastiq.load(saved)


LOADERS = [elastiq.load, lambda path, bits=None: load(path, bits)]


@pytest.mark.parametrize("read", LOADERS, ids=["elastiq", "transformers"])
@pytest.mark.parametrize(
    ("family", "embeddings"), [("llama", False), ("gemma3", True), ("gpt2", False), ("qwen3_moe", False)]
)
def test_both_loaders_read_what_both_save(
    checkpoint: Callable[..., Path], tmp_path: Path, read: Callable[..., object], family: str, embeddings: bool
) -> None:
    path = checkpoint(family, embeddings)
    model = read(path, 3)
    name = next(iter(nested_matrices(model)))
    set_bits(model, {name: 4})  # which holds more planes than the others now
    wanted = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert model.config is not None and torch.equal(logits(model), wanted)
    for again in LOADERS:
        found = again(tmp_path / "saved")
        assert torch.equal(logits(found), wanted)
        assert {n: m.bits for n, m in nested_matrices(found).items()} == {
            n: 4 if n == name else 3 for n in nested_matrices(model)
        }
        found.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("read", LOADERS, ids=["elastiq", "transformers"])
def test_saving_spoils_no_checkpoint(
    checkpoint: Callable[..., Path], tmp_path: Path, read: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    path, other = tmp_path / "mine", tmp_path / "other"
    for place in (path, other):
        shutil.copytree(checkpoint(), place)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    model = read(path)
    with caplog.at_level("WARNING", logger="elastiq"):
        model.save_pretrained(path)
    assert f"{path}: is the checkpoint of this model and holds all of it; nothing was written" in caplog.text
    with pytest.raises(ElastiqError, match=f"{other}: holds a checkpoint, which saving would spoil; choose another"):
        model.save_pretrained(other)
    set_bits(model, 3)
    with pytest.raises(ElastiqError, match="save the widths in use into another directory"):
        model.save_pretrained(path)
    set_bits(model, 8)
    model.model.norm.weight.data[0] += 1
    with pytest.raises(ElastiqError, match=r"is the checkpoint itself and holds another model\.norm\.weight"):
        model.save_pretrained(path)
    for place in (path, other):
        assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_copies_and_pickles_save_themselves(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = elastiq.load(checkpoint(), 3)
    torch.save(model, tmp_path / "pickle")
    for number, other in enumerate((copy.deepcopy(model), torch.load(tmp_path / "pickle", weights_only=False))):
        other.model.norm.weight.data.mul_(2)
        other.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(elastiq.load(tmp_path / str(number))), logits(other))
    assert not torch.equal(logits(model), logits(other))


def test_compiled_forward(checkpoint: Callable[..., Path]) -> None:
    """A prompt and its next token, at a width and at another one afterwards."""
    model = load(checkpoint(), 4)
    compiled = torch.compile(model, backend="aot_eager")
    for bits in (4, 3):
        set_bits(model, bits)
        assert torch.allclose(logits(compiled), logits(model), atol=1e-5)
    answers = []
    for forward in (compiled, model):
        with torch.inference_mode():
            past = with_cache(model, DynamicCache(config=model.config))
            forward(input_ids=IDS, **past)
            answers.append(forward(input_ids=IDS[:, :1], **past).logits)
    assert torch.allclose(*answers, atol=1e-5)


def test_scales_stay_half_in_any_precision(checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)
    matrix = nested_matrices(model)["model.layers.0.mlp.up_proj"]
    assert matrix.scale_2.dtype == torch.float16 and matrix.dtype == torch.bfloat16
    assert torch.equal(matrix.dense(), nested_matrices(elastiq.load(checkpoint()))[matrix.stored.name].dense())


def test_generates_and_serves_a_pipeline(checkpoint: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    path = checkpoint()
    model, tokenizer = load(path, device_map="cpu"), AutoTokenizer.from_pretrained(path)
    settings = {"do_sample": False, "max_new_tokens": 8}
    expected = elastiq.load(path).generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, **settings), expected)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)("abc", **settings)[0]["generated_text"]
    assert answer.startswith("abc")
    again = pipeline("text-generation", model=str(path), device_map="auto")("abc", **settings)[0]["generated_text"]
    assert again == answer


def test_device_maps_by_name(checkpoint: Callable[..., Path]) -> None:
    devices = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu",
               "model.rotary_emb": "cpu"}  # fmt: skip
    for device_map in ("auto", "sequential", devices):
        model = load(checkpoint(), 3, device_map=device_map)
        assert torch.equal(logits(model), logits(elastiq.load(checkpoint(), 3)))


def test_tied_embeddings_stay_one(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "source", tie_word_embeddings=True)
    write_random(build_model("llama", tie_word_embeddings=True), source, tmp_path / "nested", embeddings=True)
    model = load(tmp_path / "nested")
    assert isinstance(model.get_input_embeddings(), NestedEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead)
    assert torch.equal(logits(model), logits(elastiq.load(tmp_path / "nested")))
    write_random(build_model("llama", tie_word_embeddings=True), source, tmp_path / "plain", fingerprint={"seed": 1})
    model = load(tmp_path / "plain")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_altered_or_missing_arrays_stop_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    elastiq_dir = tmp_path / "altered"
    elastiq_dir.mkdir()
    for file in checkpoint().iterdir():
        (elastiq_dir / file.name).write_bytes(file.read_bytes())
    plane = elastiq_dir / "plane-3.safetensors"
    content = bytearray(plane.read_bytes())
    content[-1] ^= 1
    plane.write_bytes(bytes(content))
    assert load(elastiq_dir, 2) is not None
    with pytest.raises(ElastiqError, match="altered"):
        load(elastiq_dir, 3)
    load(checkpoint(), 2).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    config["quantization_config"]["planes"] = 4
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ElastiqError, match=r"is absent, config\.json says"):
        load(tmp_path / "saved", 4)


def test_without_the_import_it_fails_loudly(checkpoint: Callable[..., Path]) -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
    else:
        raise SystemExit(f"{path} was loaded")
print("stopped")
"""
    paths = [str(checkpoint(family)) for family in ("llama", "gpt2", "mixtral")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert done.stdout == "stopped\n", done.stderr


def test_adapters_on_top_learn(checkpoint: Callable[..., Path]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from elastiq.integrations.peft import NestedLora
    from elastiq.runtime import NestedLinear

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    config._register_custom_module({NestedLinear: NestedLora})
    model = peft.get_peft_model(load(checkpoint(), 3), config)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trainable = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name and g is not None and g.abs().sum() > 0 for name, g in trainable.items())
    with pytest.raises(ElastiqError, match=r"q_proj: an adapter cannot be merged into nested codes; keep it on top"):
        model.merge_and_unload()
    bare = model.unload()
    assert torch.equal(bare(IDS).logits, load(checkpoint(), 3)(IDS).logits)
