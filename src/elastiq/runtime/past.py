"""A cache layer of transformers that appends in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """What DynamicLayer is, with keys and values as views of buffers that have room to spare.

    key_buffer, value_buffer: [batch, heads, any, size], of which the first `length` positions are filled; None where
    the layer is empty. capacity: positions of these buffers once they are its own and contiguous, 0 before that.
    form: (batch, heads, size, dtype) of both buffers as `reserve` left them; None where they differ.
    Views that were handed out stay as they were: what they show is never written again.
    """

    def __init__(self, layer: DynamicLayer | None = None) -> None:
        """Empty, or in the place of `layer`, whose states it takes over."""
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None
        self.length = self.capacity = 0
        self._shown = 0  # positions of these buffers that views handed out show
        self.form: tuple[Any, ...] | None = None
        super().__init__()
        if layer is not None and layer.keys is not None and layer.values is not None:
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values

    @property
    def keys(self) -> Tensor | None:
        self._shown = max(self._shown, self.length)
        return None if self.key_buffer is None else self.key_buffer[:, :, : self.length]

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self.key_buffer, self.length, self.capacity = states, 0 if states is None else states.shape[2], 0

    @property
    def values(self) -> Tensor | None:
        self._shown = max(self._shown, self.length)
        return None if self.value_buffer is None else self.value_buffer[:, :, : self.length]

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self.value_buffer, self.length, self.capacity = states, 0 if states is None else states.shape[2], 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad or self.keeps_gradients:
            # Gradients go through tensors that nobody writes again.
            held = self.keys, self.values
            assert held[0] is not None and held[1] is not None
            keys, values = torch.cat([held[0], key_states], 2), torch.cat([held[1], value_states], 2)
            self.keys, self.values = keys, values
            return keys, values
        key_buffer, value_buffer = self.reserve(key_states.shape[2])
        begin, self.length = self.length, self.length + key_states.shape[2]
        key_buffer[:, :, begin : self.length] = key_states
        value_buffer[:, :, begin : self.length] = value_states
        self._shown = self.length
        return key_buffer[:, :, : self.length], value_buffer[:, :, : self.length]

    def reserve(self, more: int) -> tuple[Tensor, Tensor]:
        """Both buffers with room for `more` positions behind the filled ones."""
        assert self.key_buffer is not None and self.value_buffer is not None
        needed = self.length + more
        # Outside of inference mode nothing may write into what was made within.
        sealed = not torch.is_inference_mode_enabled() and (
            self.key_buffer.is_inference() or self.value_buffer.is_inference()
        )
        if needed > self.capacity or self.length < self._shown or sealed:
            self.capacity = needed + max(64, needed // 4)
            self.key_buffer = self._moved(self.key_buffer)
            self.value_buffer = self._moved(self.value_buffer)
            self._shown = 0
            forms = {(*b.shape[:2], b.shape[3], b.dtype) for b in (self.key_buffer, self.value_buffer)}
            self.form = forms.pop() if len(forms) == 1 else None
        return self.key_buffer, self.value_buffer

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients go through what is held."""
        return any(buffer is not None and buffer.requires_grad for buffer in (self.key_buffer, self.value_buffer))

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            DynamicLayer().crop(tokens_to_remove)  # refused by transformers from 5.18 on; before, a length to keep
            self.length = min(self.length, tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)

    def _moved(self, buffer: Tensor) -> Tensor:
        batch, heads, _, size = buffer.shape
        wider = buffer.new_empty(batch, heads, self.capacity, size)
        wider[:, :, : self.length] = buffer[:, :, : self.length]
        return wider
