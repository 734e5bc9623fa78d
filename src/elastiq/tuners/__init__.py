"""What becomes of finished codes and scales when the whole model is judged."""

from .scales import ScaleTuning

__all__ = ["ScaleTuning"]
