"""How a text begins, and windows of it."""

from __future__ import annotations

import pytest
import tiny
import torch

from elastiq.core import ElastiqError
from elastiq.text import Windows, beginning, begins, check_ids, ending, tokenize
from elastiq.text.calibration import calibration_ids, tuning_ids
from elastiq.text.evaluation import windows

TEMPLATES = {None: (), "$A": (), "$A </s>": (), "<s> $A": (256,), "<s> $A </s>": (256,), "</s> <s> $A": (257, 256)}
TEXT = "the quick brown fox jumps over lazy dogs. " * 20


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.items())
def test_the_post_processor_says_how_a_text_begins(template: str | None, expected: tuple[int, ...]) -> None:
    assert beginning(tiny.make_tokenizer(template)) == expected
    assert ending(tiny.make_tokenizer(template)) == ((257,) if (template or "").endswith("</s>") else ())


def test_special_tokens_that_do_not_stand_around_a_text_are_refused() -> None:
    class Between:
        def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [5, 9, 6] if add_special_tokens else [5, 6]}

    with pytest.raises(ElastiqError, match=r"special tokens do not stand around a text.*\(--no-bos\)"):
        beginning(Between())


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_window_starts_as_a_text_does(template: str | None) -> None:
    """Calibration, tuning and evaluation cut the same windows, naively: the prefix, then the next of the text."""
    tokenizer = tiny.make_tokenizer(template)
    start, plain = list(TEMPLATES[template]), list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    room = 16 - len(start)
    expected = torch.tensor([start + plain[at : at + room] for at in range(0, 4 * room, room)])
    assert torch.equal(calibration_ids([TEXT], tokenizer, 4, 16), expected)
    assert torch.equal(tuning_ids([TEXT], None, tokenizer, 4, 16), expected)
    cut = windows(TEXT, tokenizer, 16, 4, "text")
    assert torch.equal(cut.ids, expected)
    assert cut.beginning == tuple(start) and cut.first == max(1, len(start))
    assert len(windows(TEXT, tokenizer, 16, None, "text").ids) == len(plain) // room
    without = torch.tensor(plain[:64]).view(4, 16)
    assert torch.equal(calibration_ids([TEXT], tokenizer, 4, 16, bos=False), without)
    assert torch.equal(tuning_ids([TEXT], None, tokenizer, 4, 16, bos=False), without)
    assert torch.equal(windows(TEXT, tokenizer, 16, 4, "text", bos=False).ids, without)


def test_ids_say_themselves_how_they_begin() -> None:
    ids = torch.arange(64)
    assert torch.equal(calibration_ids(ids, tiny.make_tokenizer("<s> $A"), 4, 16), ids.view(4, 16))


def test_a_text_that_spells_its_beginning_has_it_once() -> None:
    """As a chat template does whose first words are the beginning's."""
    tokenizer = tiny.make_tokenizer("<s> $A")
    assert tokenize("<s>ab", tokenizer, "text", (256,)) == tokenize("ab", tokenizer, "text", (256,))
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    chat = [{"messages": [{"role": "user", "content": TEXT}]}]
    assert torch.equal(calibration_ids(chat, tokenizer, 4, 16), calibration_ids([TEXT], tokenizer, 4, 16))


def test_windows_with_no_room_for_a_text_are_refused() -> None:
    tokenizer = tiny.make_tokenizer("</s> <s> $A")
    with pytest.raises(ElastiqError, match=r"seq_len=2 has no room for text behind what .*; use more than 2"):
        calibration_ids([TEXT], tokenizer, 4, 2)
    with pytest.raises(ElastiqError, match="window=2 predicts nothing; use at least 3"):
        windows(TEXT, tokenizer, 2, 4, "text")


def test_words_for_how_windows_begin() -> None:
    assert begins(()) == "no special tokens"
    assert begins((1,)) == "the tokenizer's token 1 before every window"
    assert begins((2, 1)) == "the tokenizer's tokens 2, 1 before every window"


def test_half_of_a_pair_is_no_text() -> None:
    with pytest.raises(ElastiqError, match=r"calibration: the text has U\+D83D, half of a surrogate pair"):
        calibration_ids(["half \ud83d" + TEXT], tiny.make_tokenizer(), 2, 16)


@pytest.mark.parametrize(("ids", "wrong"), [([0, 260], 260), ([-1, 5], -1), ([-2, 999], -2)])
def test_a_token_beyond_the_embedding(ids: list[int], wrong: int) -> None:
    model = tiny.build_model("llama")
    check_ids(model, torch.tensor([[0, 259]]), "text")
    with pytest.raises(ElastiqError, match=f"text: the token id {wrong} is not among the 260 rows of the model's emb"):
        check_ids(model, torch.tensor([ids]), "text")


def test_what_is_left_over_is_dropped() -> None:
    assert Windows.of(range(7), (9,), 4).ids.tolist() == [[9, 0, 1, 2], [9, 3, 4, 5]]
    assert Windows.of(range(7), (), 4).ids.tolist() == [[0, 1, 2, 3]]
    assert Windows.of(range(2), (9,), 4).ids.shape == (0, 4)
