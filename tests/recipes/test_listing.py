"""The list of parts, the page made of it, and the papers behind a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastiq import cli, recipes
from elastiq.core import Recipe, Step
from elastiq.recipes.listing import methods, page, papers

DOCS = Path(__file__).parents[2] / "docs"


def test_every_part_is_listed_and_says_what_it_does(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["recipes", "--json", str(tmp_path / "m.json")])
    assert result.exit_code == 0 and all(name in result.stdout for name in recipes.names())
    data = json.loads((tmp_path / "m.json").read_text())
    rows = data["parts"]
    assert rows == methods()
    assert {(row["slot"], row["name"]) for row in rows} == {
        (slot, name) for slot, members in Step.registry.items() for name in members
    }
    for row in rows:
        assert row["about"].endswith((".", ":")) and re.fullmatch(r"[1-8] to [1-8]", row["bits"])
        for title in row["paper"]:
            assert re.fullmatch(r"\S+, arXiv:\d{4}\.\d{5}", title), title


def test_every_recipe_is_listed_with_its_slots_and_papers(tmp_path: Path) -> None:
    assert CliRunner().invoke(cli.app, ["recipes", "--json", str(tmp_path / "m.json")]).exit_code == 0
    rows = json.loads((tmp_path / "m.json").read_text())["recipes"]
    assert [row["name"] for row in rows] == list(recipes.names())
    for row in rows:
        assert Recipe.from_dict(row["slots"]) == recipes.get(row["name"])
    assert "GPTQ, arXiv:2210.17323" in next(row["paper"] for row in rows if row["name"] == "gptq")


def test_the_page_is_up_to_date() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == page(), "run elastiq recipes --page docs/methods.md"


def test_papers_of_a_recipe(tmp_path: Path) -> None:
    found = papers(recipes.nested_tuned())
    assert found["solver"] == ["MatGPTQ, arXiv:2602.03537"]
    assert found.keys() == {"token-weights", "format", "solver", "tuner"} and "EfficientQAT" in found["tuner"][0]
    assert papers(recipes.rtn())["solver"] == []


@pytest.mark.parametrize("what", ["nothing-here"])
def test_cite_needs_a_checkpoint(what: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["cite", str(tmp_path / what)])
    assert result.exit_code == 1 and "no such directory; give the output of elastiq quantize" in result.output
