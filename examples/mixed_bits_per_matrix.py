"""A width for every matrix: the tenth that loses most at 4 bits is read in full, the rest at 4 bits."""

import elastiq
from elastiq import embedded
from elastiq.checkpoint import CheckpointReader
from elastiq.runtime import bits_per_weight

OUT = "example-checkpoint"
elastiq.quantize(embedded.model_dir(), OUT, elastiq.recipes.nested(levels=(2, 4, 8)), num_samples=8)

table = CheckpointReader(OUT).table  # levels.json: one row per matrix, the cost and the error of every level
table = sorted(table, key=lambda row: row["levels"]["4"]["error"], reverse=True)
widths = {row["name"]: 8 if rank < len(table) / 10 else 4 for rank, row in enumerate(table)}
for row in table[:3]:
    print(f"{row['name']}: error {row['levels']['4']['error']:.4f} at 4 bits, read at {widths[row['name']]}")

model = elastiq.load(OUT, bits=widths)
print(f"{bits_per_weight(model):.3f} bits per weight")
elastiq.set_bits(model, {table[0]["name"]: 2})  # and live, for one matrix
print(f"{bits_per_weight(model):.3f} bits per weight")
