"""Look at a model before, and at a checkpoint after: what loses most, and a page with pictures."""

from pathlib import Path

import elastiq
from elastiq import embedded
from elastiq.evaluate import evaluate
from elastiq.measure.inspection import inspect_model
from elastiq.report import write_report

MODEL, OUT = embedded.model_dir(), "example-checkpoint"

for row in inspect_model(str(MODEL), num_samples=1)["matrices"][:3]:
    print(f"{row['name']}: largest weight {row['weight_abs_max']:.3f}, largest input {row['input_abs_max']:.2f}")

elastiq.quantize(MODEL, OUT, elastiq.recipes.nested(levels=(2, 4, 8)), num_samples=8)
text = Path("example-heldout.txt")
text.write_text(embedded.heldout_text(), encoding="utf-8")
result = evaluate(OUT, [2, 4, 8], text, against=MODEL, num_windows=2)
for row in result["levels"]:
    print(f"{row['bits']} bits: perplexity {row['perplexity']:.1f}, KL divergence {row['kl_mean']:.4f}")
print(f"16 bits: perplexity {result['full']['perplexity']:.1f}; the report: {write_report(OUT)}")
