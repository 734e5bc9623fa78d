"""A width for every matrix: the best map of 3.37 bits on average, then one of 2.5, live."""

import elastiq
from elastiq import embedded
from elastiq.runtime import bits_per_weight

OUT = "example-checkpoint"
elastiq.quantize(embedded.model_dir(), OUT, elastiq.recipes.nested(levels=(2, 4, 8)), num_samples=8)

found = elastiq.allocate(OUT, elastiq.Budget(bits=3.37))  # from levels.json alone; also size=..., bits_per_weight=...
for name, bits in list(found.level_map.widths.items())[:5]:
    print(f"{name}: {bits} bits")
print(f"mean width {found.sizes['mean_bits']:.3f}, predicted loss {found.loss:.3g}, proved to {found.gap:.2%}")

model = elastiq.load(OUT, bits=found.level_map)  # or bits=3.37, or memory="10MB"
print(f"{bits_per_weight(model):.3f} bits per weight")
elastiq.set_bits(model, 2.5)  # and live; also {matrix name: bits}
print(f"{bits_per_weight(model):.3f} bits per weight")
