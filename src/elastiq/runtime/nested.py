"""Bit planes held in a module, in the order in which products read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import ElastiqError, Fold, RowPowers, SideTerm, Width, fold_out
from ..kernels.matmul import TiledWeight, decode, matmul, tile_plane, tile_scale, untile_plane, untile_scale
from .lazy import LazyWeight
from .stored import StoredMatrix, plane_array, readable_widths

_BITS = {2: torch.int16, 4: torch.int32}
"""Type that holds the bits of a float of so many bytes."""


class NestedMatrix(nn.Module):
    """Base of the modules that stand where a matrix stood; holds its planes packed and reads the first `bits` of them.

    Buffers carry the names of the checkpoint's arrays, in tile order. The module starts empty: `hold` gives it one
    plane after another, then `bits` is set. `dtype` is what it answers in where no input says otherwise; it follows
    `.to(dtype)`, while scales and zero points always stay in half precision. `activations` is how compiled products
    read their inputs: "int16" (fixed point, relative error about 5e-5), "int8", or "float".
    """

    _like: Tensor
    activations = "int16"
    changes = 0
    """How often any matrix has got planes, another width or another place, for code that keeps addresses of planes."""

    def __init__(self, stored: StoredMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = stored
        self._planes = 0
        self._bits = 0
        self._tiled: tuple[list[int], TiledWeight] | None = None
        self._sizes = stored.out_features, stored.in_features, stored.group_size
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def weight(self) -> Tensor:
        """What the module in whose place this stands calls its weight, in its layout, decoded when it is computed with.

        The checkpoint's array of this name, the first plane, is found among the buffers alone.
        """
        if not self.bits:
            raise AttributeError(f"{self.stored.name}: no width yet")
        *_, rows, columns = self.stored.shape
        shape = (columns, rows) if self.stored.transposed else (rows, columns)
        return LazyWeight(self._own_layout, shape, self.dtype, self._like.device)

    def _own_layout(self, dtype: torch.dtype) -> Tensor:
        whole = self.dense(dtype=dtype)
        return whole.mT if self.stored.transposed else whole

    @property
    def max_bits(self) -> int:
        """Number of planes held."""
        return self._planes

    @property
    def bits(self) -> Width:
        """Width at which the matrix is read. Setting it raises ElastiqError for a width the planes held cannot give."""
        return self._bits

    @bits.setter
    def bits(self, bits: Width) -> None:
        widths = readable_widths(self.stored.levels, self._planes, self.stored.coded)
        if isinstance(bits, str) or bits not in widths:
            held = ", ".join(map(str, widths)) or "no width yet"
            raise ElastiqError(
                f"{self.stored.name}: {bits} bits were asked for, the planes held give {held}; "
                "use elastiq.set_bits, which reads missing planes"
            )
        self._bits = bits
        NestedMatrix.changes += 1
        level = self.stored.scale_level(bits)
        planes = [plane_array(plane) for plane in range(1, bits + 1)]
        self._names = (*planes, *self.stored.scale_names(level))
        self._level = level
        self._tiled = None

    def hold(self, arrays: dict[str, Tensor]) -> None:
        """Take the arrays of the next plane. Raises ElastiqError if they are not exactly those of that plane, or hold
        NaN or infinite numbers."""
        specs = self.stored.arrays(self._planes + 1)
        found = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
        if found != specs:
            raise ElastiqError(f"{self.stored.name}: plane {self._planes + 1} is {found}, not {specs}")
        self._planes += 1
        arrays = {name: array.to(self._like.device) for name, array in arrays.items()}
        level = self.stored.level_of(self._planes)
        read = self.stored.decode_scales(level, arrays) if self.stored.coded and level is not None else {}
        tiled = self.stored.tiled_arrays(self._planes)
        for name, array in arrays.items():
            self.stored.check(name, array)
        for name, array in (arrays | read).items():
            if name in tiled:
                array = tile_plane(array) if array.dtype == torch.uint8 else tile_scale(array)
            self.register_buffer(name, array, persistent=name in arrays)
        NestedMatrix.changes += 1

    def arrays(self) -> dict[str, Tensor]:
        """All that `hold` was given, by short name and in the checkpoint's order."""
        *_, rows, inputs = self.stored.shape
        held = {}
        for plane in range(1, self._planes + 1):
            tiled = self.stored.tiled_arrays(plane)
            for name, (dtype, _) in self.stored.arrays(plane).items():
                array = cast(Tensor, self._buffers[name])
                if name not in tiled:
                    held[name] = array
                    continue
                held[name] = untile_plane(array, rows, inputs) if dtype == torch.uint8 else untile_scale(array, rows)
        return held

    def dense(self, index: Tensor | int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values at `bits`: the whole matrix, or the rows (of experts: the one matrix) that `index` picks."""
        if len(self.stored.shape) == 3 and index is None:
            return torch.stack([self.dense(expert, dtype) for expert in range(self.stored.shape[0])])
        if not self.stored.parts:
            return self._coded(index, dtype)
        rows, expert = (index, None) if len(self.stored.shape) == 2 else (None, int(cast(int, index)))
        powers, folds, terms = self.restored(expert)
        if powers is not None and not folds and not terms:  # an embedding decodes no more than its rows
            factor = powers.factor if rows is None else powers.factor[rows]
            return (self._coded(index, torch.float32) * factor[:, None]).to(dtype)
        whole = self._sum(expert, folds, terms)
        whole = (whole if powers is None else powers.out_of(whole)).to(dtype)
        return whole if rows is None else whole[rows]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias at `bits`, in the dtype of x; by way of the dense matrix if gradients are asked for."""
        powers, folds, terms = self.restored() if self.stored.parts else (None, [], [])
        if powers is None:
            return self._product(x, bias, folds, terms)
        # In float32, which holds what the powers are still to bring back.
        y = self._product(x.float(), None, folds, terms) * powers.factor
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def _product(self, x: Tensor, bias: Tensor | None, folds: list[Fold], terms: list[SideTerm]) -> Tensor:
        """`product` without the powers of rows."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _shifted(F.linear(x, self._sum(None, folds, terms).to(x.dtype), bias), terms, self._bits)
        for fold in folds:
            x = fold.forward(x)
        y = matmul(x, self.tiled(), bias, self.activations) if self.stored.coded else None
        for term in terms:
            product = term.product(x, self._bits)
            y = product if y is None else y + product
        assert y is not None
        if bias is not None and not self.stored.coded:
            y = y + bias.to(y.dtype)
        return _shifted(y, terms, self._bits)

    def restored(self, expert: int | None = None) -> tuple[RowPowers | None, list[Fold], list[SideTerm]]:
        """Powers of rows, folds and side terms of the matrix, or of one expert, over the arrays held here."""
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        found = self.stored.restore(held, expert)
        powers = next((part for part in found if isinstance(part, RowPowers)), None)
        return powers, [p for p in found if isinstance(p, Fold)], [p for p in found if isinstance(p, SideTerm)]

    def _sum(self, expert: int | None, folds: list[Fold], terms: list[SideTerm]) -> Tensor:
        """[out, in] float32 that codes and `terms` add up to behind `folds`."""
        values = [term.dense(self._bits) for term in terms]
        if self.stored.coded:
            values.append(self._coded(expert, torch.float32))
        return fold_out(folds, sum(values[1:], values[0]))

    def _coded(self, index: Tensor | int | None, dtype: torch.dtype) -> Tensor:
        """What the nested integer codes alone say, as `dense` picks."""
        weight = self.tiled()
        if len(self.stored.shape) == 2:
            return decode(weight, cast(Tensor | None, index), dtype)
        planes, scale, zero_point, *rest = weight
        zero_point = None if zero_point is None else zero_point[index]
        return decode(TiledWeight([plane[index] for plane in planes], scale[index], zero_point, *rest), None, dtype)

    def read_arrays(self) -> list[Tensor]:
        """The arrays that reading at `bits` touches."""
        return [cast(Tensor, self._buffers[name]) for name in self.stored.read_names(self._bits)]

    def tiled(self) -> TiledWeight:
        """The matrix at `bits` as products read it; its arrays are those held here."""
        buffers: Any = self._buffers
        held = self._tiled
        if torch.compiler.is_compiling():
            return self._describe([buffers[name] for name in self._names])
        # Assigned state, shared memory and the like move planes without a word to this module.
        addresses = [buffers[name].data_ptr() for name in self._names]
        if held is None or held[0] != addresses:
            held = self._tiled = addresses, self._describe([buffers[name].detach() for name in self._names])
        return held[1]

    def _describe(self, arrays: list[Tensor]) -> TiledWeight:
        planes, scale, *zero_point = arrays[: self._bits], *arrays[self._bits :]
        return TiledWeight(planes, scale, zero_point[0] if zero_point else None, self._level, *self._sizes)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is read from stored scales follows them."""
        super()._load_from_state_dict(*args, **kwargs)
        NestedMatrix.changes += 1
        if not self.stored.coded or self.stored.scales == "half":
            return
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        for level in filter(None, map(self.stored.level_of, range(1, self._planes + 1))):
            for name, array in self.stored.decode_scales(level, held).items():
                self.register_buffer(name, tile_scale(array), persistent=False)
        self._tiled = None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            NestedMatrix.changes += 1
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices apply to what is stored, changes of dtype do not."""
        planes = range(1, self._planes + 1)
        names = {name for plane in planes for name in (*self.stored.arrays(plane), *self.stored.tiled_arrays(plane))}
        kept = {id(b) for n, b in self.named_buffers(recurse=False) if n in names and b.is_floating_point()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            if id(tensor) in kept:
                return fn(tensor.view(_BITS[tensor.element_size()])).view(tensor.dtype)
            return fn(tensor)

        NestedMatrix.changes += 1
        self._tiled = None  # some moves leave the tensors and change where they lie
        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.stored.shape))
        return f"{shape}, bits={self._bits}, max_bits={self._planes}, group_size={self.stored.group_size}"


def _shifted(y: Tensor, terms: list[SideTerm], level: int) -> Tensor:
    for term in terms:
        shift = term.shift(level)
        if shift is not None:
            y = y + shift.to(y.dtype)
    return y
