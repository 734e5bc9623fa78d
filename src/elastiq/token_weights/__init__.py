"""How much each calibration token counts, one file per method."""

from .attention_concentration import AttentionConcentration
from .block_output import BLOCK_OUTPUT, BlockOutput
from .uniform import Uniform

__all__ = ["BLOCK_OUTPUT", "AttentionConcentration", "BlockOutput", "Uniform"]
