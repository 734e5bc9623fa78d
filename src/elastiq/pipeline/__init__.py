"""One run, from a model directory to a nested checkpoint: its plan, the stream of blocks, the tuning, the loop."""

from .planning import plan
from .run import Summary, quantize
from .stream import BlockStream

__all__ = ["BlockStream", "Summary", "plan", "quantize"]
