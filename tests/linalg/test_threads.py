"""What the number of threads must not change: sums, factors, singular vectors, and whole checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from tiny import make_model

import elastiq
from elastiq import recipes
from elastiq.core import Recipe, mean, storage, total
from elastiq.linalg import in_chunks, inverse_factor, leading_triplets

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_for_any_number(compute: Callable[[], Result]) -> list[Result]:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(compute())
        assert torch.get_num_threads() == count
    return results


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1,), (5,), (4096,), (70_001,), (257, 1031), (0, 3)])
def test_a_total_is_the_sum_of_all_values(shape: tuple[int, ...]) -> None:
    values = random(*shape)
    first, *others = same_for_any_number(lambda: total(values))
    assert all(other == first for other in others)
    assert first == pytest.approx(math.fsum(values.flatten().tolist()), rel=1e-13, abs=1e-12)
    if values.numel():
        assert mean(values.t()) == pytest.approx(first / values.numel(), rel=1e-12)


@pytest.mark.parametrize("size", [3, 300, 512, 700, 1100])
def test_a_factor_is_the_same_and_right(size: int) -> None:
    x = random(size + 50, size)
    hessian = x.T @ x
    first, *others = same_for_any_number(lambda: inverse_factor(hessian))
    assert all(torch.equal(other, first) for other in others)
    assert torch.equal(first, first.triu())
    product = hessian.double() @ (first.double().T @ first.double())
    assert torch.allclose(product, torch.eye(size, dtype=torch.float64), atol=2e-3)


def test_what_is_not_positive_definite_in_its_second_panel_is_refused() -> None:
    hessian = torch.eye(600)
    hessian[5, 5] = -1.0  # rows are taken from the last to the first
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(hessian)


def test_singular_triplets_are_the_same_and_leading() -> None:
    matrix = random(257, 344)
    first, *others = same_for_any_number(lambda: leading_triplets(matrix, 7))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
    left, values, right = first
    assert torch.allclose(values, torch.linalg.svdvals(matrix.double())[:7].float(), rtol=1e-4)
    assert torch.allclose(matrix @ right.T, left * values, atol=1e-3)


def test_chunks_come_back_in_order_and_each_on_one_thread() -> None:
    torch.set_num_threads(2)
    assert in_chunks(lambda n: (n, torch.get_num_threads()), range(5)) == [(n, 1) for n in range(5)]
    with pytest.raises(ZeroDivisionError):
        in_chunks(lambda n: 1 / n, [1, 0])
    assert torch.get_num_threads() == 2


def test_stored_scales_are_the_same() -> None:
    scale = random(300, 400).abs() + 0.1
    first, *others = same_for_any_number(lambda: storage("double").encode(scale))
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


_RECIPES = {
    "nested": recipes.nested((2, 4)),
    "bitstack": recipes.bitstack((1, 2)),
    "lorc": recipes.get("lorc", levels=(3,)),
}


@pytest.mark.parametrize("recipe", _RECIPES.values(), ids=_RECIPES.keys())
def test_checkpoints_are_the_same_to_the_last_byte(recipe: Recipe, tmp_path: Path) -> None:
    """The sizes are such that torch and LAPACK share their work among threads."""
    shape = {"hidden_size": 256, "intermediate_size": 344, "num_hidden_layers": 1}
    source = make_model("llama", tmp_path / "model", **shape)
    ids = torch.randint(1, 250, (6, 96), generator=torch.Generator().manual_seed(0))

    def digests() -> dict[str, str]:
        output = tmp_path / str(torch.get_num_threads())
        elastiq.quantize(source, output, recipe, ids)
        files = json.loads((output / "checksums.json").read_text())["files"]
        return {name: row["sha256"] for name, row in files.items()}

    first, *others = same_for_any_number(digests)
    assert all(other == first for other in others)
