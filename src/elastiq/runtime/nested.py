"""Bit planes held in a module and decoded when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import ElastiqError, derive
from ..linalg import unpack_planes
from .stored import StoredMatrix, plane_array, readable_widths


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """Values float32 [..., in] of codes uint8 [..., in] with scale and zero point [..., groups]."""
    values = codes.float()
    if codes.shape[-1] % group_size:
        group = torch.arange(codes.shape[-1], device=codes.device) // group_size
        return values.sub_(zero_point[..., group]).mul_(scale[..., group])
    grouped = values.unflatten(-1, (-1, group_size))
    return grouped.sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(-2)


class NestedMatrix(nn.Module):
    """Base of the modules that stand where a matrix stood; holds its planes packed and reads the first `bits` of them.

    Buffers carry the names of the checkpoint's arrays. The module starts empty: `hold` gives it one plane after
    another, then `bits` is set. `dtype` is what it answers in where no input says otherwise; it follows `.to(dtype)`,
    while scales and zero points always stay in half precision.
    """

    _like: Tensor

    def __init__(self, stored: StoredMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = stored
        self._planes = 0
        self._bits = 0
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def max_bits(self) -> int:
        """Number of planes held."""
        return self._planes

    @property
    def bits(self) -> int:
        """Width at which the matrix is read. Setting it raises ElastiqError for a width the planes held cannot give."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        widths = readable_widths(self.stored.levels, self._planes)
        if bits not in widths:
            held = ", ".join(map(str, widths)) or "no width yet"
            raise ElastiqError(
                f"{self.stored.name}: {bits} bits were asked for, the planes held give {held}; "
                "use elastiq.set_bits, which reads missing planes"
            )
        self._bits = bits

    def hold(self, arrays: dict[str, Tensor]) -> None:
        """Take the arrays of the next plane. Raises ElastiqError if they are not exactly those of that plane."""
        specs = self.stored.arrays(self._planes + 1)
        found = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
        if found != specs:
            raise ElastiqError(f"{self.stored.name}: plane {self._planes + 1} is {found}, not {specs}")
        for name, array in arrays.items():
            self.register_buffer(name, array.to(self._like.device))
        self._planes += 1

    def dense(self, index: Tensor | int | None = None) -> Tensor:
        """Values float32 at `bits`: the whole matrix, or what `index` picks along the first axis."""
        planes = [self._pick(plane_array(plane), index) for plane in range(1, self._bits + 1)]
        scale, zero_point = self._scales(index)
        codes = unpack_planes(planes, self.stored.in_features)
        return decode(codes, scale, zero_point, self.stored.group_size)

    def read_arrays(self) -> list[Tensor]:
        """The arrays that reading at `bits` touches."""
        names = [plane_array(plane) for plane in range(1, self._bits + 1)]
        names += self.stored.scale_arrays(self.stored.scale_level(self._bits))
        return [self.get_buffer(name) for name in names]

    def _pick(self, name: str, index: Tensor | int | None) -> Tensor:
        array = self.get_buffer(name)
        return array if index is None else array[index]

    def _scales(self, index: Tensor | int | None) -> tuple[Tensor, Tensor]:
        own = self.stored.scale_level(self._bits)
        scale = self._pick(f"scale_{own}", index).float()
        if self.stored.symmetric:
            zero_point = torch.full_like(scale, (2**own - 1) / 2)
        else:
            zero_point = self._pick(f"zero_point_{own}", index).float()
        return (scale, zero_point) if own == self._bits else derive(scale, zero_point, own, self._bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices apply to scales and zero points, changes of dtype do not."""
        stored = ("scale_", "zero_point_")
        halves = {id(buffer) for name, buffer in self.named_buffers(recurse=False) if name.startswith(stored)}

        def keep_half(tensor: Tensor) -> Tensor:
            if id(tensor) in halves:
                return fn(tensor.view(torch.int16)).view(torch.float16)
            return fn(tensor)

        return super()._apply(keep_half, recurse)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.stored.shape))
        return f"{shape}, bits={self._bits}, max_bits={self._planes}, group_size={self.stored.group_size}"
