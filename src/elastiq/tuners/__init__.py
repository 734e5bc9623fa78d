"""What becomes of solved codes and scales when a block, or the whole model, is judged."""

from .co_distillation import CoDistillation
from .gumbel import GumbelChoice
from .scales import ScaleTuning
from .sign_round import SignRound

__all__ = ["CoDistillation", "GumbelChoice", "ScaleTuning", "SignRound"]
