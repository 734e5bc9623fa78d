"""GrowingLayer is DynamicLayer in every respect but where the states lie."""

from __future__ import annotations

import contextlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from elastiq.runtime.past import GrowingLayer

ACTIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(-3, 0)),
    st.tuples(st.just("reorder_cache"), st.just(torch.tensor([1, 0, 1]))),
    st.tuples(st.just("batch_repeat_interleave"), st.integers(1, 2)),
    st.tuples(st.just("batch_select_indices"), st.just(torch.tensor([0, 1]))),
    st.tuples(st.just("reset"), st.none()),
)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    empty = [x is None or x.numel() == 0 for x in (a, b)]
    return all(empty) if any(empty) else torch.equal(a, b)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=12), st.booleans())
def test_any_history_leaves_the_same_states(actions: list[tuple[str, object]], takes_over: bool) -> None:
    generator = torch.Generator().manual_seed(len(actions))
    theirs = DynamicLayer()
    theirs.update(*torch.randn(2, 2, 3, 5, 4, generator=generator))
    ours = GrowingLayer(theirs if takes_over else None)
    if not takes_over:
        ours.update(theirs.keys, theirs.values)
    for action, argument in actions:
        if action == "update":
            batch = 2 if theirs.keys is None else theirs.keys.shape[0]
            states = torch.randn(2, batch, 3, argument, 4, generator=generator)  # type: ignore[call-overload]
            results = [layer.update(*states) for layer in (theirs, ours)]
            assert all(map(same, *results))
        elif action == "reset":
            for layer in (theirs, ours):
                layer.reset()
        elif action != "crop" or theirs.get_seq_length() > 3:
            for layer in (theirs, ours):
                getattr(layer, action)(argument)
        assert same(ours.keys, theirs.keys) and same(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)


def test_a_length_to_keep_is_what_dynamic_layer_makes_of_it() -> None:
    """transformers before 5.18 crops to it, later ones refuse."""
    states, found = torch.randn(1, 2, 10, 4), []
    for layer in (DynamicLayer(), GrowingLayer()):
        layer.update(states, states)
        with contextlib.suppress(ValueError):
            layer.crop(6)
        layer.update(states[:, :, :1], states[:, :, :1])
        found.append((layer.get_seq_length(), layer.keys, layer.values))
    assert found[0][0] == found[1][0] and all(map(same, found[0][1:], found[1][1:]))


def test_what_was_handed_out_before_a_crop_stays_as_it_was() -> None:
    states, later = torch.randn(2, 1, 2, 10, 4), torch.randn(2, 1, 2, 5, 4)
    for layer in (DynamicLayer(), GrowingLayer()):
        returned = layer.update(*states)
        handed = layer.keys, layer.values
        layer.crop(-4)
        layer.update(*later)
        for views in (returned, handed):
            assert all(map(torch.equal, views, states))  # type: ignore[arg-type]
        assert torch.equal(layer.keys, torch.cat([states[0][:, :, :6], later[0]], 2))
        assert torch.equal(layer.values, torch.cat([states[1][:, :, :6], later[1]], 2))


def test_states_of_inference_mode_go_on_outside_of_it() -> None:
    states = torch.randn(2, 1, 2, 10, 4)
    for layer in (DynamicLayer(), GrowingLayer()):
        with torch.inference_mode():
            layer.update(*states)
        found = layer.update(*states)
        assert all(torch.equal(ours, torch.cat([part, part], 2)) for ours, part in zip(found, states, strict=True))


def test_gradients_reach_what_was_appended() -> None:
    states = torch.randn(2, 1, 2, 3, 4, requires_grad=True)
    gradients = []
    for layer in (DynamicLayer(), GrowingLayer()):
        layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        layer.update(*states)
        keys, values = layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        gradients.append(torch.autograd.grad((keys.square() * values).sum(), states)[0])
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_appending_moves_nothing_until_the_room_is_used_up() -> None:
    layer = GrowingLayer()
    layer.update(torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4))
    addresses = set()
    for _ in range(60):
        keys, _ = layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
        addresses.add(keys.data_ptr())
    assert len(addresses) == 1
    assert layer.form == (1, 2, 4, torch.float32)
