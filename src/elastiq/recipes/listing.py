"""Every registered part and every recipe as data: what it is, what it takes, whose it is."""

from __future__ import annotations

import inspect
import re
from typing import Any

from ..core import Recipe, Step
from . import get, names

_PAPER = re.compile(r"(\w[\w.+#-]*),?\s\(?(\d{4}\.\d{4,5})")


def methods() -> list[dict[str, Any]]:
    """One row per part, by slot and name: name, slot, paper, needs, bits, about (its docstring's first paragraph)."""
    return [_row(step) for slot in sorted(Step.registry) for _, step in sorted(Step.registry[slot].items())]


def recipe_rows() -> list[dict[str, Any]]:
    """One row per recipe: name, its slots as `Recipe.to_dict` gives them, and the papers behind them."""
    made = ((name, get(name)) for name in names())
    return [
        {"name": name, "slots": recipe.to_dict(), "paper": sorted(set().union(*papers(recipe).values()))}
        for name, recipe in made
    ]


def papers(recipe: Recipe) -> dict[str, list[str]]:
    """Papers behind the filled slots of a recipe, by slot: "GPTQ, arXiv:2210.17323"."""
    found: dict[str, list[str]] = {}
    for step in recipe.steps:
        found.setdefault(step.slot, []).extend(_papers(type(step)))
    return found


def page() -> str:
    """docs/methods.md."""
    lines = ["# Methods", "", "Written by `elastiq recipes --page FILE` from the classes; do not edit.", ""]
    header = ["", "| name | what it does | needs | bits | papers |", "|---|---|---|---|---|"]
    rows = methods()
    for slot in dict.fromkeys(row["slot"] for row in rows):
        lines += [f"## {slot.capitalize()}", *header]
        for row in rows:
            if row["slot"] == slot:
                cells = (f"`{row['name']}`", row["about"], ", ".join(row["needs"]) or "nothing", row["bits"])
                lines.append(f"| {' | '.join(cells)} | {'; '.join(row['paper']) or 'none'} |")
        lines.append("")
    return "\n".join(lines)


def _papers(step: type[Step]) -> list[str]:
    return [f"{name}, arXiv:{number}" for name, number in _PAPER.findall(inspect.cleandoc(step.__doc__ or ""))]


def _row(step: type[Step]) -> dict[str, Any]:
    about = inspect.cleandoc(step.__doc__ or "").split("\n\n")[0]
    return {
        "name": step.name,
        "slot": step.slot,
        "paper": _papers(step),
        "needs": [*sorted(step.needs), *step.resources],
        "bits": f"{step.bits[0]} to {step.bits[1]}",
        "about": " ".join(about.split()).replace("|", "\\|"),
    }
