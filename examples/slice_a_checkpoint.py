"""Fewer planes are a smaller model: three of eight planes, copied, load at 1 to 3 bits."""

from pathlib import Path

import elastiq
from elastiq import embedded
from elastiq.checkpoint import CheckpointReader, slice_checkpoint

OUT, SMALL = "example-checkpoint", "example-small"
elastiq.quantize(embedded.model_dir(), OUT, elastiq.recipes.nested(levels=(2, 4, 8)), num_samples=8)

if not Path(SMALL).exists():
    slice_checkpoint(OUT, 3, SMALL)
for directory in (OUT, SMALL):
    planes = sum(file.stat().st_size for file in Path(directory).glob("plane-*.safetensors"))
    print(f"{directory}: {planes / 1e6:.2f} MB of planes, widths {CheckpointReader(directory).available}")

elastiq.load(SMALL, bits=3)
try:
    elastiq.load(SMALL, bits=4)
except elastiq.ElastiqError as error:
    print(f"4 bits are refused: {error}")
