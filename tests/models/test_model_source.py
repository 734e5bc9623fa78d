"""Reading a model directory, and the sentence for everything that can be wrong with one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elastiq.core import ElastiqError
from elastiq.evaluate import load_full
from elastiq.models import ModelSource, build_skeleton, load_module
from elastiq.models import source as source_module


@pytest.fixture
def broken(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a model that a test may spoil."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.make_model("llama", tmp_path / "sharded", max_shard_size="60KB")


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_names_sizes_and_tensors_of_a_sharded_model(sharded: Path) -> None:
    source = ModelSource(sharded)
    assert len(source.shards) > 2
    assert source.num_bytes == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    with source.open() as reader:
        for name, file in source.tensor_files.items():
            with safe_open(sharded / file, "pt") as handle:
                assert torch.equal(reader.read(name), handle.get_tensor(name))


def test_fingerprint_is_of_whole_files_and_sees_one_changed_byte(broken: Path) -> None:
    before = ModelSource(broken).fingerprint()
    assert set(before) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} | (
        {"chat_template.jinja"} & {file.name for file in broken.iterdir()}
    )
    assert before["config.json"] == hashlib.sha256((broken / "config.json").read_bytes()).hexdigest()
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    after = ModelSource(broken).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_tokenizer_is_the_directory_s_own(broken: Path) -> None:
    tokenizer = ModelSource(broken).tokenizer()
    assert tokenizer.decode(tokenizer("héllo", add_special_tokens=False)["input_ids"]) == "héllo"
    for file in source_module.TOKENIZER_FILES:
        (broken / file).unlink(missing_ok=True)
    with pytest.raises(ElastiqError, match=r"has no tokenizer; copy tokenizer\.json"):
        ModelSource(broken).tokenizer()


def test_not_a_model_directory(tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match=r"is not a model directory: it has no config\.json"):
        ModelSource(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ElastiqError, match=r"config\.json is not valid JSON"):
        ModelSource(tmp_path)
    with pytest.raises(ElastiqError, match="is a file, not a model directory"):
        ModelSource(tmp_path / "config.json")
    with pytest.raises(ElastiqError, match="does not exist; give a model directory or a hub name"):
        ModelSource(str(tmp_path / "nothing"))


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(source_module, "snapshot_download", offline)
    with pytest.raises(
        ElastiqError, match=r"org/name is not a directory here and could not be fetched .*no connection"
    ):
        ModelSource("org/name")


def test_a_hub_snapshot_holds_nothing_that_could_be_run(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    asked: dict[str, object] = {}

    def fetch(name: str, **kwargs: object) -> str:
        asked.update(kwargs, name=name)
        return str(tiny_model("llama"))

    monkeypatch.setattr(source_module, "snapshot_download", fetch)
    assert ModelSource("org/name", revision="v1").path == tiny_model("llama")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    assert not any(str(pattern).endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]


def test_pickles_are_never_read(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ElastiqError, match="pickle files only, which are never read; save it once in safetensors"):
        ModelSource(broken)
    (broken / "pytorch_model.bin").unlink()
    with pytest.raises(ElastiqError, match=r"holds no weights: neither model\.safetensors nor"):
        ModelSource(broken)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = ModelSource(sharded).shards[1]
    (sharded / shard).unlink()
    with pytest.raises(ElastiqError, match=f"lacks the shard {shard} that .* names; download the model again"):
        ModelSource(sharded)


def test_truncated_shard_is_named(broken: Path, sharded: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ElastiqError, match=r"model\.safetensors is damaged or cannot be read .*; download it again"):
        ModelSource(broken)
    source = ModelSource(sharded)
    shard = sharded / source.shards[-1]
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(ElastiqError, match=f"{shard.name} is damaged or cannot be read"):
        load_module(build_skeleton(source, torch.float32), "", source, torch.float32, "cpu")


def test_unreadable_shard_is_named(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(source_module, "safe_open", denied)
    with pytest.raises(ElastiqError, match=r"model\.safetensors is damaged or cannot be read \(Permission denied\)"):
        ModelSource(broken)


def test_index_that_lies(sharded: Path) -> None:
    index = sharded / source_module.INDEX
    good = json.loads(index.read_text())
    name, shards = "model.norm.weight", sorted(set(good["weight_map"].values()))
    wrong = next(shard for shard in shards if shard != good["weight_map"][name])
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], name: wrong}}))
    assert ModelSource(sharded).tensor_files == good["weight_map"]  # the files have the last word, as in transformers
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.lost.weight": wrong}}))
    with pytest.raises(ElastiqError, match=r"promises the tensor model\.lost\.weight, which no file holds; download"):
        ModelSource(sharded)
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ElastiqError, match="names a shard outside its directory"):
        ModelSource(sharded)
    for content in ("{}", json.dumps({"weight_map": {name: 3}}), json.dumps({"weight_map": {name: [shards[0]]}})):
        index.write_text(content)
        with pytest.raises(ElastiqError, match="has no weight_map of file names; download the model again"):
            ModelSource(sharded)
    index.write_text("[" * 100_000)
    with pytest.raises(ElastiqError, match="is not valid JSON"):
        ModelSource(sharded)


def test_unknown_architecture_and_its_code(broken: Path) -> None:
    edit_config(broken, model_type="strange", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (broken / "code.py").write_text("raise SystemExit('code from a model directory was run')")
    with pytest.raises(ElastiqError, match=r"the architecture 'strange' is not part of transformers .* never run"):
        ModelSource(broken)


def test_code_beside_a_known_architecture_is_not_run(broken: Path) -> None:
    edit_config(broken, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (broken / "code.py").write_text("raise SystemExit('code from a model directory was run')")
    source = ModelSource(broken)
    assert type(build_skeleton(source, torch.float32)).__module__.startswith("transformers.")


def test_already_quantized_model(broken: Path) -> None:
    edit_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ElastiqError, match=r"is already quantized \(quant_method gptq\); give the 16-bit model"):
        ModelSource(broken)
    edit_config(broken, quantization_config=[1])
    with pytest.raises(ElastiqError, match=r"is already quantized \(quant_method unknown\)"):
        ModelSource(broken)
    edit_config(broken, quantization_config=None)
    assert "quantization_config" not in ModelSource(broken).config.to_dict()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(broken: Path, value: float) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, broken / "model.safetensors")
    source = ModelSource(broken)
    model = build_skeleton(source, torch.float32)
    load_module(model, "model.layers.0", source, torch.float32, "cpu")
    with pytest.raises(ElastiqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite weights"):
        load_module(model, "model.layers.1", source, torch.float32, "cpu")


def test_missing_and_misshapen_tensors_are_named(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, broken / "model.safetensors")
    source = ModelSource(broken)
    model = build_skeleton(source, torch.float32)
    with pytest.raises(ElastiqError, match=r"no tensor for the parameter model\.layers\.1\.mlp\.up_proj\.weight"):
        load_module(model, "model.layers.1", source, torch.float32, "cpu")
    with pytest.raises(ElastiqError, match=r"model\.norm\.weight has the shape \[3\] .* config\.json says \[64\]"):
        load_module(model, "model.norm", source, torch.float32, "cpu")


def from_pretrained(directory: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict())


def assert_as_transformers(directory: Path) -> None:
    """quantize reads what transformers reads, and `--against` is compared with the same."""
    source = ModelSource(directory)
    model = build_skeleton(source, torch.float32)
    load_module(model, "", source, torch.float32, "cpu")
    expected = from_pretrained(directory)
    for found in (model.state_dict(), load_full(directory, None, "cpu", torch.float32).state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_file_comes_before_a_stale_index(sharded: Path, tmp_path: Path) -> None:
    old = load_file(sharded / ModelSource(sharded).shards[0])
    torch.manual_seed(1)
    tiny.make_model("llama", tmp_path / "new")
    tensors = {name: value + 1 for name, value in load_file(tmp_path / "new/model.safetensors").items()}
    save_file(tensors, sharded / "model.safetensors", {"format": "pt"})
    source = ModelSource(sharded)
    assert source.shards == ("model.safetensors",) and source_module.INDEX not in source.fingerprint()
    assert_as_transformers(sharded)
    with source.open() as reader:
        assert not any(torch.equal(reader.read(name), value) for name, value in old.items())
    for shard in sharded.glob("model-*"):  # whatever became of the index's files
        shard.unlink()
    assert_as_transformers(sharded)


def test_files_have_the_last_word_over_their_index(sharded: Path) -> None:
    index = sharded / source_module.INDEX
    good = json.loads(index.read_text())
    shards = sorted(set(good["weight_map"].values()))
    last = load_file(sharded / shards[-1])
    twice = next(name for name, shard in good["weight_map"].items() if shard == shards[0])
    last[twice] = load_file(sharded / shards[0])[twice] + 1  # in two files: the last one counts
    save_file(last, sharded / shards[-1], {"format": "pt"})
    for name, shard in good["weight_map"].items():  # every entry names a wrong file, and one tensor has no entry
        good["weight_map"][name] = shards[shards.index(shard) - 1]
    del good["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(good))
    assert_as_transformers(sharded)


def test_an_adapter_beside_the_model_is_refused(broken: Path) -> None:
    (broken / "adapter_config.json").write_text("{}")  # transformers would add it, or load another model
    with pytest.raises(ElastiqError, match=r"holds an adapter beside the model \(adapter_config\.json\); merge it"):
        ModelSource(broken)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dtype": "torch.bfloat16"}, r"config\.json is not read by transformers .*torch\.bfloat16'\); mend"),
        ({"dtype": "auto"}, r"config\.json is not read by transformers .*'auto'\); mend"),
        ({"dtype": "int8"}, r"says dtype torch\.int8, which no weights have; write float16, bfloat16 or float32"),
        ({"dtype": 16}, "says dtype 16, which no weights have"),
        ({"vocab_size": "257"}, r"config\.json is not read by transformers .*'vocab_size'"),
        ({"num_attention_heads": 0}, r"config\.json is not read by transformers .*zero\); mend"),
        ({"hidden_act": "no_such"}, r"makes no model of its config\.json \(KeyError: 'no_such'\); mend that value"),
        ({"rope_parameters": "linear"}, r"config\.json"),
        ({"pad_token_id": 9999}, r"makes no model of its config\.json \(Padding_idx must be within num_embeddings\)"),
        ({"model_type": None}, "the architecture None is not part of transformers"),
        ({"model_type": ["llama"]}, r"the architecture \['llama'\] is not part of transformers"),
        ({"architectures": 3}, "the architecture 3 is not a causal language model|is not read by transformers 5.15"),
        ({"architectures": [None]}, "the architecture None is not a causal language|is not read by transformers 5.15"),
        ({"text_config": 3}, r"config\.json"),
    ],
)
def test_values_of_unexpected_kinds_end_in_a_sentence(broken: Path, changes: dict[str, object], sentence: str) -> None:
    edit_config(broken, **changes)
    with pytest.raises(ElastiqError, match=sentence):
        build_skeleton(ModelSource(broken), torch.float32)


def test_a_class_name_alone_says_what_a_list_of_it_says(broken: Path) -> None:
    edit_config(broken, architectures="LlamaForCausalLM")
    if transformers.__version__.startswith("5.15."):  # which refuses the value itself
        with pytest.raises(ElastiqError, match="is not read by transformers"):
            ModelSource(broken)
        return
    assert type(build_skeleton(ModelSource(broken), torch.float32)).__name__ == "LlamaForCausalLM"


def test_a_tokenizer_of_tomorrow_is_a_sentence(broken: Path) -> None:
    file = broken / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["type"] = "KindOfTomorrow"
    file.write_text(json.dumps(data))
    with pytest.raises(ElastiqError, match=r"the tokenizer cannot be loaded \(.+\); copy its files again"):
        ModelSource(broken).tokenizer()


def test_a_head_that_no_file_holds_is_not_made_up(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["lm_head.weight"]  # transformers would warn, and take random numbers
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    source = ModelSource(broken)
    with pytest.raises(ElastiqError, match=r"no tensor for the parameter lm_head\.weight"):
        load_module(build_skeleton(source, torch.float32), "lm_head", source, torch.float32, "cpu")
