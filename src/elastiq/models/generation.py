"""The generation settings beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from ..core import ElastiqError, library_errors

_FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(directory: Path) -> GenerationConfig | None:
    """What generation_config.json says, None where there is none. Raises ElastiqError if it cannot be read, or if a
    token that it names is no whole number: transformers reads such a file, and fails at the first answer."""
    if not (directory / _FILE).is_file():
        return None
    with library_errors(f"{directory / _FILE}: transformers cannot read it", "mend or remove it"):
        settings = GenerationConfig.from_pretrained(directory, local_files_only=True)
    for name in _TOKENS:
        value = getattr(settings, name)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
            raise ElastiqError(
                f"{directory / _FILE}: {name} is {value!r}, and tokens are whole numbers; mend or remove that value"
            )
    return settings
