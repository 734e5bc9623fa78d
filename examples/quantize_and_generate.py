"""Quantize a model once, then let it speak at every width."""

from transformers import AutoTokenizer

import elastiq
from elastiq import embedded

MODEL = embedded.model_dir()  # or any directory or hub name of a causal language model
OUT = "example-checkpoint"

summary = elastiq.quantize(MODEL, OUT, elastiq.recipes.nested(levels=(2, 4, 8)), num_samples=8)
print({level: round(row["bits_per_weight"], 2) for level, row in summary.levels.items()})

tokenizer = AutoTokenizer.from_pretrained(OUT)
prompt = tokenizer("Return a list of the", return_tensors="pt")
for bits in (2, 4, 8):
    model = elastiq.load(OUT, bits=bits)
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    print(f"{bits} bits: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
