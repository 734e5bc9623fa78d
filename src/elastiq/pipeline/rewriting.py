"""A model as a recipe's rewrites make it: what becomes of each parameter, and the proof that it still says the same."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Edits, ElastiqError, Recipe
from ..models import Layout, ModelSource, build_skeleton, discover, residual_stream
from ..models.residual_stream import refusal
from .stream import BlockStream

_WINDOW = 64
"""Tokens on which the rewritten model is compared with the model as it is."""
_MOST_DIFFERENT = 2e-3
"""Relative difference of logits in float32 that is arithmetic: rotations of a few thousand channels stay below a tenth
of it, and a parameter that was forgotten is hundreds of times as far."""


def plan_rewrites(source: ModelSource, recipe: Recipe, ids: Tensor, device: str) -> Edits:
    """Edits of all rewrites of the recipe, those of parameters that the model has.

    ids: int64 [windows, tokens] of a text; a part of the first window is used. Raises ElastiqError for a model that
    cannot be rewritten, and where the rewritten model says something else.
    """
    if len(recipe.rewrites) > 1:
        raise ElastiqError("recipe: one rewrite can be made of a model so far; leave out all but one")
    edits: dict[str, Edits] = {}
    some = ids[:1, :_WINDOW]
    for rewrite in recipe.rewrites:
        model = build_skeleton(source, torch.float32)
        layout = discover(model)
        trying = BlockStream(model, source, layout, some, frozenset(), device=device)

        def unchanged(block: int, tried: Edits, stream: BlockStream = trying) -> bool:
            while stream.block < block:
                stream.advance(stream.block)
            return stream.unedited(block, tried)

        stream = residual_stream(model, layout, unchanged)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        planned = {name: edit for name, edit in rewrite.plan(stream).items() if name in names and edit.changes}
        _compare(source, layout, some, planned, device)
        edits[rewrite.name] = planned
    return {name: edit for planned in edits.values() for name, edit in planned.items()}


def _compare(source: ModelSource, layout: Layout, ids: Tensor, edits: Edits, device: str) -> None:
    """Raise ElastiqError unless the model with `edits` has the logits of the model without; one block is in memory."""
    found: list[Tensor] = []
    for given in ({}, edits):
        model = build_skeleton(source, torch.float32, given)
        stream = BlockStream(model, source, discover(model), ids, frozenset(), device=device)
        for block in range(len(layout.blocks)):
            stream.advance(block)
        found.append(torch.cat(list(stream.logits())))
    difference = float((found[1] - found[0]).norm() / found[0].norm())
    if not difference <= _MOST_DIFFERENT:
        raise refusal(model, f"the rewritten model differs from the model by {difference:.1%} of its logits")
