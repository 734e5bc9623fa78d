"""The generation settings beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from ..core import ElastiqError

_FILE = "generation_config.json"


def read_generation(directory: Path) -> GenerationConfig | None:
    """What generation_config.json says, None where there is none. Raises ElastiqError if it cannot be read."""
    if not (directory / _FILE).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises what it likes
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ElastiqError(f"{directory / _FILE}: transformers cannot read it ({reason}); mend or remove it") from None
