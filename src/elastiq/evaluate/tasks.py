"""Tasks of lm-evaluation-harness, answered by one checkpoint at several widths."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointReader
from ..checkpoint.files import MAX_JSON, sha256
from ..checkpoint.names import TASKS
from ..checkpoint.sizes import map_sizes
from ..core import ElastiqError, LevelMap, library_errors
from ..inference.loading import load, set_bits
from ..text import beginning, check_ids, ending, read_records
from ..text.evaluation import checkpoint_tokenizer
from .card import write_card
from .evaluation import Reading, load_full, readings
from .record import keep_json, read_tasks

log = logging.getLogger("elastiq")

_CHOICE: dict[str, Any] = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
_NORMED = {**_CHOICE, "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
SHAPES: dict[tuple[str, ...], dict[str, Any]] = {
    ("ctx", "endings", "label"): {
        **_NORMED, "doc_to_text": "{{ctx}}", "doc_to_choice": "endings", "doc_to_target": "label",
    },
    ("goal", "sol1", "sol2", "label"): {
        **_NORMED, "doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
    },
    ("good", "bad"): {**_CHOICE, "doc_to_text": "", "doc_to_choice": "{{[good, bad]}}", "doc_to_target": 0},
    ("text",): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}  # fmt: skip
"""What is asked of JSONL files whose lines have these fields: the harness's own HellaSwag, PIQA, BLiMP and LAMBADA."""


def evaluate_tasks(
    path: str | Path,
    bits: Sequence[float | LevelMap] | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    against: str | Path | None = None,
    revision: str | None = None,
    batch_size: int = 8,
    bos: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    restart: bool = False,
    save: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """What lm-evaluation-harness says of a checkpoint at each width in `bits`, and of the model `against`.

    tasks: JSONL files of one of the `SHAPES`, YAML files of the harness (programs of their own: use those you trust),
    or names that it knows, whose data it fetches. limit: items of each task, evenly spaced in a JSONL file, the first
    ones otherwise. bits, against, dtype: as for `evaluate`. bos: whether contexts start as the tokenizer starts a text.
    save: keep every result in tasks.json beside the checkpoint as it comes; what is there already is not measured again
    unless `restart`.

    Returns {"levels": [{"bits", "bits_per_weight", ..., "tasks": {name: {metric: value, "metric_stderr": ...}}}],
    "full": {"tasks"} or None, "against", "protocol"}. Raises ElastiqError without the harness and for a task that it
    cannot read.
    """
    harness = _harness()
    reader = CheckpointReader(path)
    targets = readings(reader, bits)
    specs = [_spec(task, limit) for task in tasks]
    precision = str(dtype).removeprefix("torch.")
    kept: dict[str, Any] = {} if restart else read_tasks(path)
    tokenizer, model = checkpoint_tokenizer(path), None
    start = beginning(tokenizer) if bos else ()
    if start and ending(tokenizer):
        raise ElastiqError(
            "tasks: the tokenizer also puts tokens behind a text, which lm-evaluation-harness would leave between a "
            "context and its answer; use --no-bos"
        )
    without: dict[str, Any] = {} if bos else {"bos": False}
    jobs: list[tuple[Reading | None, dict[str, Any], str]] = [
        (target, spec, _key(spec, precision, dict(target.widths), *without)) for target in targets for spec in specs
    ]
    if against is not None:
        jobs += [(None, spec, _key(spec, precision, [str(against), revision], *without)) for spec in specs]
    wanted = [job for job in jobs if job[2] not in kept]
    for index, (target, spec, key) in enumerate(wanted):
        if progress:
            progress("answering tasks", index, len(wanted))
        if target is None and (index == 0 or wanted[index - 1][0] is not None):
            assert against is not None
            model = load_full(against, revision, device, dtype)
        elif target is not None:
            model = model or load(path, max(t.widest for t in targets), device=device, dtype=dtype)
            set_bits(model, target.widths)
        metrics = _run(harness, spec, model, tokenizer, limit, batch_size, bool(start))
        label = {"bits": None} if target is None else dict(target.label)
        kept[key] = {"task": spec["name"], "items": spec["items"], **label, **without, "metrics": metrics}
        if save:
            _keep(path, kept)
    if progress:
        progress("answering tasks", len(wanted), len(wanted))

    def rows(of: Reading | None) -> dict[str, Any]:
        return {spec["name"]: kept[key]["metrics"] for target, spec, key in jobs if target is of}

    return {
        "checkpoint": Path(path).resolve().name,
        "against": None if against is None else Path(against).name,
        "protocol": {"harness": version("lm_eval"), "limit": limit, "dtype": precision, **without},
        "levels": [
            {**target.label, **map_sizes(reader, target.widths, dtype), "tasks": rows(target)} for target in targets
        ],
        "full": None if against is None else {"tasks": rows(None)},
    }


def _keep(path: str | Path, kept: dict[str, Any]) -> None:
    """A checkpoint that cannot be written is no reason to lose the result."""
    try:
        keep_json(Path(path) / TASKS, {"results": kept})
        write_card(path)
    except ElastiqError as error:
        log.warning("%s; nothing is kept for the next time", error)


def _harness() -> Any:
    """The package, which takes seconds to import and is only needed here."""
    try:
        import lm_eval.api.task
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ElastiqError(
            f"tasks: lm-evaluation-harness is not installed ({error}); run pip install 'elastiq[tasks]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _spec(task: str, limit: int | None) -> dict[str, Any]:
    """name, what it is (`version`), items, and docs with a shape, or a file, or nothing but the name."""
    path = Path(task)
    if path.suffix == ".jsonl":
        docs = _docs(path)
        shape = next((s for fields, s in SHAPES.items() if set(fields) <= docs[0].keys()), None)
        if shape is None:
            known = "; ".join(", ".join(fields) for fields in SHAPES)
            raise ElastiqError(
                f"tasks: {path} has lines of {', '.join(sorted(docs[0]))}, known are {known}; write a YAML task for it"
            )
        count = min(limit or len(docs), len(docs))
        docs = [docs[index * len(docs) // count] for index in range(count)]
        facts = json.dumps([docs, shape], sort_keys=True)
        return {"name": path.stem, "version": _digest(facts), "items": count, "docs": docs, "shape": shape}
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ElastiqError(f"tasks: {path} does not exist; give a file or a name of lm-evaluation-harness")
        return {"name": path.stem, "version": sha256(path), "items": limit, "file": path}
    return {"name": task, "version": version("lm_eval"), "items": limit}


def _docs(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ElastiqError(f"tasks: {path} is larger than {MAX_JSON >> 20} MiB; cut it")
    except OSError as error:
        raise ElastiqError(f"tasks: {path} cannot be read ({error.strerror}); give a JSONL file") from None
    docs = [record for _, record in read_records(path, "tasks")]
    if not docs or not all(isinstance(doc, dict) and doc.keys() == docs[0].keys() for doc in docs):
        raise ElastiqError(f"tasks: the lines of {path} are not objects of the same fields")
    return docs


def _run(
    harness: Any, spec: dict[str, Any], model: Any, tokenizer: Any, limit: int | None, batch_size: int, bos: bool
) -> dict[str, float]:
    """Metrics of one task for a model as it stands. bos: whether the tokenizer's special tokens stand around a text."""

    def check(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        check_ids(model, args[0], spec["name"])

    hook = model.get_input_embeddings().register_forward_pre_hook(check)
    with ExitStack() as undo:
        # Tasks are programs of their own.
        undo.enter_context(
            library_errors(
                f"tasks: {spec['name']} cannot be run by lm-evaluation-harness", "mend the task, or leave it out"
            )
        )
        undo.callback(hook.remove)
        if "docs" in spec:
            import datasets

            docs = datasets.Dataset.from_list(spec["docs"])
            config = {"task": spec["name"], "test_split": "test", "custom_dataset": lambda **_: {"test": docs}}
            task: Any = harness.api.task.ConfigurableTask(config={**config, **spec["shape"], "num_fewshot": 0})
            known = harness.tasks.TaskManager(include_defaults=False)
        else:
            task = str(spec.get("file", spec["name"]))
            known = harness.tasks.TaskManager(include_defaults="file" not in spec)
        answered = harness.simple_evaluate(
            model=harness.models.huggingface.HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos
            ),
            tasks=[task],
            task_manager=known,
            limit=None if "docs" in spec else limit,
            log_samples=False,
            bootstrap_iters=0 if "docs" not in spec else 1000,
        )
        results = answered["results"]
    row = results.get(spec["name"]) or next(iter(results.values()))
    return {
        name.partition(",")[0]: float(value)
        for name, value in row.items()
        if "," in name and isinstance(value, (int, float)) and value == value
    }


def _key(spec: dict[str, Any], precision: str, *model: object) -> str:
    """Everything that a result depends on, as far as it can be known."""
    return _digest(json.dumps([spec["name"], spec["version"], spec["items"], precision, *model], sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
