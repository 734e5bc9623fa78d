"""recipes, cite: the methods and their papers."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from .. import recipes
from ..checkpoint import CheckpointReader
from ..checkpoint.files import write_named
from ..recipes.listing import methods, papers, recipe_rows
from ..recipes.listing import page as methods_page
from .app import app
from .options import Checkpoint, Json, writable, write
from .tables import out, show_methods


@app.command("recipes")
def recipes_command(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe as JSON, to change it and quantize by it.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write docs/methods.md here.", show_default=False, callback=writable)
    ] = None,
    json: Json = None,
) -> None:
    """The recipes, and every part that a recipe can be made of: what it does, needs and comes from."""
    if name is not None:
        recipe = recipes.get(name).to_dict()
        write(json, recipe)
        typer.echo(dumps(recipe, indent=2))
        return
    rows = methods()
    write(json, {"recipes": recipe_rows(), "parts": rows})
    if page is not None:
        write_named(page, methods_page().encode())
    show_methods(recipes.names(), rows)


@app.command("cite")
def cite_command(checkpoint: Checkpoint) -> None:
    """The papers behind CHECKPOINT."""
    for slot, titles in papers(CheckpointReader(checkpoint).recipe).items():
        for title in titles or ("no paper",):
            out.print(f"{slot}: {title}")
