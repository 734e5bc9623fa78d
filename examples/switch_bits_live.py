"""One loaded model changes its width between two calls."""

import time

import torch

import elastiq
from elastiq import embedded

OUT = "example-checkpoint"
elastiq.quantize(embedded.model_dir(), OUT, elastiq.recipes.nested(levels=(2, 4, 8)), num_samples=8)

model = elastiq.load(OUT, bits=2, max_bits=8)  # holds 8 planes, reads 2
ids = torch.arange(200).unsqueeze(0)
best = {}
for bits in (8, 4, 3, 2):  # 3 has no scales of its own: they are derived from 2 bits
    begin = time.perf_counter()
    elastiq.set_bits(model, bits)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    best[bits] = model(ids).logits.argmax(-1)
    agreement = (best[bits] == best[8]).float().mean()
    print(f"{bits} bits, set in {milliseconds:.2f} ms: {agreement:.0%} of the predictions are those of 8 bits")
