"""Which tensors of a checkpoint make which parameter.

Checkpoints and module trees differ in names and in shape: renamed modules, a missing base-model prefix, one tensor per
expert where the tree has one fused parameter. transformers describes these differences as data; here they are applied
to a few parameters at a time, so that a block can be read without the rest of the model.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..core import Edits, ElastiqError, require_held
from .source import ModelSource, TensorReader


@dataclass
class _Group:
    """Checkpoint tensors that are require_held together, and the converter if more than the name differs."""

    first: str
    converter: WeightConverter | None
    tensors: list[tuple[str, str]] = field(default_factory=list)
    """(checkpoint name, the converter's pattern that it matched), in natural order."""

    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.first]
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], pattern) for pattern in patterns]


class WeightMap:
    """How the parameters and persistent buffers of `model` (as just built) are made from the tensors of `source`.

    tied: parameter name -> all names of the same parameter (itself included); only where there are several. edits: what
    becomes of parameters as they are read. borrowed: parameter -> the one whose tensors it is made of too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        dtype: torch.dtype,
        edits: Edits,
        borrowed: Mapping[str, str],
    ) -> None:
        state = model.state_dict()
        self.edits, self.borrowed = edits, borrowed
        self.source = source
        self.tied = _tied(model)
        self._groups = _group(model, source, state)
        self._owner = {name: group for group in self._groups for name in group.targets() if name in state}
        self._dtypes = _fixed_dtypes(model, state, dtype)
        self._floating = {name for name, tensor in state.items() if tensor.is_floating_point()}

    def __contains__(self, name: str) -> bool:
        return name in self._owner or name in self.borrowed

    def read(self, names: Iterable[str], dtype: torch.dtype, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """(name, new tensor on the CPU) of `names` and of what is require_held together with them.

        Floating-point tensors come in `dtype`, save those that the model keeps in a precision of its own. Raises
        ElastiqError for a tensor that is missing, unreadable or not finite.
        """
        groups = []
        for name in names:
            if name in self.borrowed:
                yield name, self._edited(name, self._plain(self.borrowed[name], dtype, model), model)
                continue
            group = self._owner.get(name)
            if group is None:
                raise ElastiqError(f"{self.source.path}: the checkpoint has no tensor for the parameter {name}")
            if group not in groups:
                groups.append(group)
        with self.source.open() as reader:
            for group in groups:
                for name, tensor in self._convert(group, reader, dtype, model):
                    yield name, self._edited(name, tensor, model)

    def _edited(self, name: str, tensor: Tensor, model: PreTrainedModel) -> Tensor:
        edit = self.edits.get(name)
        if edit is None:
            return tensor
        read = partial(self._plain, dtype=torch.float32, model=model)
        return edit.apply(tensor.float(), read).to(tensor.dtype)

    def _plain(self, name: str, dtype: torch.dtype, model: PreTrainedModel) -> Tensor:
        """A parameter as the checkpoint has it."""
        with self.source.open() as reader:
            return dict(self._convert(self._owner[name], reader, dtype, model))[name]

    def _convert(
        self, group: _Group, reader: TensorReader, dtype: torch.dtype, model: PreTrainedModel
    ) -> Iterator[tuple[str, Tensor]]:
        dtype = self._dtypes.get(group.first, dtype)
        if group.converter is None:
            yield group.first, self._read(group.tensors[-1][0], group, reader, dtype)
            return
        converter: Any = copy.deepcopy(group.converter)
        for name, pattern in group.tensors:
            converter.add_tensor(group.first, name, pattern, self._read(name, group, reader, dtype))
        result = converter.convert(group.first, model=model, config=model.config)
        if isinstance(result, tuple):  # transformers 5.0 returns its error log too
            result = result[0]
        for name, tensor in result.items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            yield name, tensor.contiguous()

    def _read(self, name: str, group: _Group, reader: TensorReader, dtype: torch.dtype) -> Tensor:
        stored = reader.read(name)
        if not stored.is_floating_point():
            if self._floating.isdisjoint(group.targets()):
                return stored.clone()
            raise ElastiqError(
                f"{self.source.path}: {name} is stored in {str(stored.dtype).removeprefix('torch.')} without scales "
                "that are known; give the 16-bit model"
            )
        if not bool(torch.isfinite(stored).all()):
            raise ElastiqError(
                f"{self.source.path}: the tensor {name} holds NaN or infinite weights; "
                "a damaged model cannot be quantized, download it again"
            )
        require_held(stored, dtype, f"{self.source.path}: the tensor {name}")
        return stored.to(dtype, copy=True)

    def same_values(self, first: str, second: str, model: PreTrainedModel) -> bool:
        """Whether two parameters have the same weights in the checkpoint."""
        values = [next(t for n, t in self.read([name], torch.float32, model) if n == name) for name in (first, second)]
        return torch.equal(*values)


def _group(model: PreTrainedModel, source: ModelSource, state: dict[str, Tensor]) -> list[_Group]:
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    for name in sorted(source.tensor_files.keys() - (source.scaling.companions - state.keys()), key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, _Group(target, converter))
        group.tensors.append((name, pattern or name))
    return list(groups.values())


def _tied(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: tuple(same) for same in names.values() if len(same) > 1 for name in same}


def _fixed_dtypes(model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Tensors that keep their own precision: the model's list of float32 modules, and what it built otherwise."""
    fixed = {name: t.dtype for name, t in state.items() if t.is_floating_point() and t.dtype != dtype}
    keep = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    keep |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for pattern in keep:
        matches = re.compile(pattern.replace("*", ".*")).search
        fixed.update({name: torch.float32 for name in state if matches(name)})
    return fixed
