"""What logits say about a model: perplexity, and its distance to the full model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import ElastiqError

_CHUNK = 2**20
"""Logits worked on at a time: intermediate values stay small whatever the vocabulary."""
_LARGEST_LOG = 700.0
"""exp() of more is not a double."""


@dataclass
class Scores:
    """Sums over predicted positions of one model at one width; `name` stands for it in messages."""

    name: str
    positions: int = 0
    nll: float = 0.0
    agreed: int = 0
    divergence: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor, full: Tensor | None = None) -> None:
        """Count `logits` [n, vocabulary] against the token that came, `targets` [n], and the full model's logits.

        The arithmetic is float64 (float32 on a device without it), a few positions at a time.
        Raises ElastiqError if the logits are not finite.
        """
        exact = torch.float32 if logits.device.type == "mps" else torch.float64
        size = max(1, _CHUNK // logits.shape[-1])
        for first in range(0, len(logits), size):
            chunk = slice(first, first + size)
            log_q = logits[chunk].to(exact).log_softmax(-1)
            nll = -log_q.gather(1, targets[chunk, None]).sum().item()
            if not math.isfinite(nll):
                raise ElastiqError(f"{self.name}: logits are not finite in {logits.dtype}; use --dtype float32")
            self.nll += nll
            if full is not None:
                log_p = full[chunk].to(exact).log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0)
                self.divergence.append(kl.cpu())
                self.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.positions += len(logits)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.positions, _LARGEST_LOG))

    def to_dict(self) -> dict[str, Any]:
        """Perplexity, KL(full || this) in nats per position and top-1 agreement; null where no full model was given."""
        row: dict[str, Any] = {"perplexity": self.perplexity}
        kl = torch.cat(self.divergence).numpy() if self.divergence else None
        row["kl_mean"] = None if kl is None else float(kl.mean())
        row["kl_p99"] = None if kl is None else float(np.quantile(kl, 0.99))
        row["kl_max"] = None if kl is None else float(kl.max())
        row["top1_agreement"] = None if kl is None else self.agreed / self.positions
        return row
