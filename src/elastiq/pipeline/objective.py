"""How far a block is from what it was, as a function of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..core import Site

Run = Callable[[int, Mapping[str, Tensor]], Tensor]


class BlockObjective:
    """Mean square distance of a block's outputs from the outputs kept of it; an `Objective`.

    sites: the block's matrices. block: name of its module. run: window and parameters of the block -> outputs.
    outputs: [windows, seq_len, hidden]. originals: the matrices [out, in] by name. called: told before each loss how
    many were computed.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        block: str,
        run: Run,
        outputs: Tensor,
        originals: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
        called: Callable[[int], None],
    ) -> None:
        parameters = by_parameter(sites)
        self._parameters = {name.removeprefix(f"{block}."): members for name, members in parameters.items()}
        self._run, self._outputs, self._originals = run, outputs, originals
        self._dtype, self._device = dtype, device
        self._calls, self._called = 0, called

    def __len__(self) -> int:
        return len(self._outputs)

    def loss(
        self, weight: Callable[[str], Tensor], windows: Sequence[int], second: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Mean over all numbers of these windows' outputs."""
        self._called(self._calls)
        self._calls += 1
        total = torch.zeros((), device=self._device)
        for index, output in enumerate(self._each(weight, windows)):
            kept = self._outputs[windows[index]].to(output.device, output.dtype)
            others = () if second is None else (second[0][index],)
            losses = [(output - other).float().square().mean() for other in (kept, *others)]
            total = total + sum(losses[1:], losses[0]) / len(losses)
        return total / len(windows)

    @torch.no_grad()
    def answers(self, weight: Callable[[str], Tensor], windows: Sequence[int]) -> tuple[Tensor, ...]:
        """Outputs [windows, seq_len, hidden]."""
        return (torch.stack(list(self._each(weight, windows))),)

    def original(self, name: str) -> Tensor:
        return self._originals[name]

    def _each(self, weight: Callable[[str], Tensor], windows: Sequence[int]) -> Sequence[Tensor]:
        parameters = {
            name: parameter(members, weight, self._device, self._dtype)
            for name, members in self._parameters.items()
        }
        return [self._run(window, parameters) for window in windows]


def by_parameter(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites by the name of the model's parameter they are in, experts in their order."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.tensor if site.expert is not None else f"{site.name}.weight", []).append(site)
    return {name: sorted(members, key=lambda site: site.expert or 0) for name, members in found.items()}


def parameter(
    members: Sequence[Site], weight: Callable[[str], Tensor], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """The parameter that holds these matrices, as its module stores it."""
    values = [weight(site.name).to(device, dtype) for site in members]
    values = [value.T if members[0].transposed else value for value in values]
    return torch.stack(values) if members[0].expert is not None else values[0]
