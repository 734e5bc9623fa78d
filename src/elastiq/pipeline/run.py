"""From a model directory to one nested checkpoint, block by block."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointReader, CheckpointWriter, is_finished, work_directory
from ..checkpoint.files import tree_bytes
from ..checkpoint.publish import new_place
from ..checkpoint.sizes import level_sizes
from ..core import (
    Codes,
    Edits,
    ElastiqError,
    Fold,
    Format,
    QuantizedWeight,
    Recipe,
    RowPowers,
    SideTerm,
    Site,
    Stats,
    Term,
    Tuner,
    common_power,
    held,
    plain_count,
    total,
)
from ..evaluate import doubts, mean_error, write_card
from ..foreign.importing import ordinary
from ..formats import Integer
from ..linalg import native
from ..models import NO_EDITS, Layout, ModelSource, build_skeleton, discover, free_module, load_module, read_generation
from ..runtime.swap import embedding_factor
from ..solvers import RoundToNearest
from ..text import beginning, check_ids
from ..text.calibration import calibration_ids, file_names, tuning_ids
from ..tuners.training import codes_of
from .absorption import Absorbed, absorb
from .guard import Checked, check_config, check_result, keep_logits
from .planning import DEFAULT_RECIPE, STATES_IN_MEMORY, plan_of
from .rewriting import plan_rewrites
from .stream import BlockStream
from .tuning import Forgetful, arithmetic, tune

log = logging.getLogger("elastiq")

Progress = Callable[[str, int, int], None]

TOKENS_PER_CHANNEL = 1 / 16
"""A matrix that fewer tokens per input channel reached (an expert rarely chosen) is rounded to nearest."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    levels: level -> bits_per_weight (counted over the quantized matrices), bytes_in_memory (the planes up to that level
    with their scales, and everything else in float32, as a processor holds it), bytes_on_disk (the files a reader of
    that level needs), error (mean over the matrices of the relative output error, None for a level that was tuned
    afterwards). tuning: level -> the tuner's loss before and after, on windows it did not train on. checked: how far
    the loaded checkpoint is from the model. already_finished: nothing was done, the checkpoint was there.
    """

    output: str
    levels: dict[int, dict[str, Any]]
    matrices: int
    windows: int
    seconds: float
    peak_memory: int
    resumed_blocks: int = 0
    fallbacks: tuple[str, ...] = ()
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)
    checked: Checked | None = None
    already_finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe | None = None,
    calibration: str | Path | Sequence[Any] | Tensor | None = None,
    *,
    num_samples: int = 128,
    seq_len: int = 512,
    tuning: str | Path | Sequence[Any] | Tensor | None = None,
    bos: bool = True,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Quantize `model` by `recipe` into the directory `output`.

    model: a directory, a hub name, or what `import_model` reads: a GGUF file, a packed directory.
    calibration: text or JSONL file(s), strings, chat records, token ids, or None for the text in the package. tuning:
    the same for a recipe with a tuner, None for the calibration's and the package's text in equal parts. bos: whether
    every window of text starts as the tokenizer starts a text, with what models are trained to see there. dtype: of the
    forward passes' arithmetic (float32 by default; bfloat16 for a tuner of up to 4 bits where the device is made for
    it). progress(what, done, total) is called as the work goes on. Finished blocks and tuned levels are durable: the
    same call after a crash resumes, and gives the same bytes (with the same number of threads, where it tunes). Raises
    ElastiqError, with a sentence, for input that cannot be handled; nothing half-written is left at `output`.
    """
    num_samples, seq_len = plain_count(num_samples, "num_samples"), plain_count(seq_len, "seq_len")
    new_place(output)
    with ordinary(model, Path(output)) as directory:
        return _quantize(
            directory, output, recipe or DEFAULT_RECIPE, calibration, num_samples, seq_len, tuning, bos, revision,
            device, dtype, restart, progress,
        )  # fmt: skip


def _quantize(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    calibration: str | Path | Sequence[Any] | Tensor | None,
    num_samples: int,
    seq_len: int,
    tuning: str | Path | Sequence[Any] | Tensor | None,
    bos: bool,
    revision: str | None,
    device: str,
    dtype: torch.dtype | None,
    restart: bool,
    progress: Progress | None,
) -> Summary:
    begin = time.perf_counter()
    report = progress or (lambda what, done, total: None)
    source = ModelSource(model, revision)
    read_generation(source.path)
    tokenizer = source.tokenizer()
    ids = calibration_ids(calibration, tokenizer, num_samples, seq_len, bos=bos)
    start = beginning(tokenizer) if bos and not isinstance(calibration, Tensor) else ()
    if len(ids) < num_samples and not isinstance(calibration, Tensor):
        log.info("the calibration text gives %d windows of %d tokens, not %d", len(ids), seq_len, num_samples)
    trained = None
    if recipe.tuner is not None:
        trained = tuning_ids(tuning, calibration, tokenizer, recipe.tuner.windows, ids.shape[1], bos=bos)
    report("reading the model", 0, 1)
    begins = {"beginning": list(start)} if start else {}
    fingerprint = _fingerprint(source, recipe, {**_text_facts(ids), **begins}, dtype or torch.float32)
    if recipe.tuner is not None and trained is not None:
        dtypes = [str(arithmetic(device, dtype, group)) for group in recipe.tuner.groups(recipe.levels)]
        fingerprint["tuning"] = {**_text_facts(trained), "dtypes": dtypes}
    report("reading the model", 1, 1)
    output = Path(output)
    if not restart and is_finished(output, fingerprint):
        write_card(output)
        return _summary(output, len(ids), begin, already_finished=True)
    edits = plan_rewrites(source, recipe, ids, device) if recipe.rewrites else NO_EDITS
    skeleton = build_skeleton(source, dtype or torch.float32, edits)
    if recipe.token_weights is not None and recipe.token_weights.attention:
        skeleton.set_attn_implementation("eager")  # the others keep their probabilities to themselves
    layout = discover(skeleton)
    if trained is not None:
        check_ids(skeleton, trained, "tuning")
    config = _config(source, layout)
    check_config(source, config)
    if recipe.embeddings and layout.embedding is not None:
        embedding_factor(skeleton.get_submodule(layout.embedding), layout.embedding)
    _check_disk(output, plan_of(source, skeleton, layout, recipe, num_samples, seq_len).disk)
    with CheckpointWriter(output, fingerprint, restart) as writer:
        done = writer.finished()
        if not _units(layout, recipe) <= done:
            stream = BlockStream(
                skeleton, source, layout, ids, recipe.needs | {"abs_max"}, dtype or torch.float32, device, writer.work,
                STATES_IN_MEMORY, recipe.token_weights,
            )  # fmt: skip
            run = _Run(recipe, writer, stream, report)
            run.blocks()
            keep_logits(writer, stream)
            if recipe.embeddings:
                report("quantizing embeddings", 0, 1)
                run.embeddings(skeleton, source)
            del run, stream
        info: dict[str, Any] = {
            "model": source.path.resolve().name,
            "calibration": file_names(calibration),
            "windows": len(ids),
            "seq_len": ids.shape[1],
            **begins,
            **({} if bos else {"bos": False}),
            "skipped": layout.skipped,
            **({} if Path(model).exists() else {"base_model": str(model)}),
        }
        if recipe.tuner is not None and trained is not None:
            sites = layout.sites + (layout.outer if recipe.embeddings else ())
            tuned = tune(
                writer, source, edits, layout, sites, recipe.levels, recipe.tuner, trained, dtype, device, report
            )  # fmt: skip
            info["tuning"] = {"texts": file_names(tuning), "windows": len(trained), "loss": tuned}
        report("writing the checkpoint", 0, 1)
        checked: list[Checked] = []

        def check(result: Path) -> None:
            report("comparing it with the model", 0, 1)
            checked.append(check_result(writer, ids, dtype or torch.float32, result, _weighs_gradients(recipe)))
            report("comparing it with the model", 1, 1)

        writer.finish(_base(source, edits, layout, recipe), source.path, config, recipe, info, check)
    write_card(output)
    for doubt in doubts(CheckpointReader(output, verify=False).table):
        log.warning("%s", doubt)
    report("writing the checkpoint", 1, 1)
    return _summary(output, len(ids), begin, resumed_blocks=len(done), checked=checked[0])


class _Run:
    """The loop's body: one block at a time, from statistics to durable codes."""

    def __init__(self, recipe: Recipe, writer: CheckpointWriter, stream: BlockStream, report: Progress) -> None:
        self.recipe, self.writer, self.stream, self.report = recipe, writer, stream, report

    def blocks(self) -> None:
        count = len(self.stream.layout.blocks)
        for block in range(count):
            self.report("quantizing blocks", block, count)
            self._block(block)
        self.report("quantizing blocks", count, count)

    def _block(self, block: int) -> None:
        unit = _unit(block)
        if unit not in self.writer.finished():
            weights = self.stream.weights(block)
            statistics = self.stream.collect(block)
            energy = self.stream.output_energy(block)
            self._write(unit, self.stream.layout.at(block), weights, statistics, energy)
        replaced = None
        if self.recipe.inputs == "quantized":
            top = self.recipe.levels[-1]
            replaced = {name: q.dequantize(top) for name, q in self.writer.read_unit(unit).items()}
            replaced |= self.writer.read_beside(unit)
        self.stream.advance(block, replaced)

    def embeddings(self, model: Any, source: ModelSource) -> None:
        """The embedding table rounded to nearest; an output head of its own solved like any matrix."""
        if _unit(-1) in self.writer.finished():
            return
        sites = self.stream.layout.outer
        statistics = {site.name: self.stream.final_stats() if site.role == "head" else Stats() for site in sites}
        for site in sites:
            load_module(model, site.name, source, torch.float32, "cpu")
        self._write(_unit(-1), sites, self.stream.weights(-1), statistics)

    def _write(
        self,
        unit: str,
        sites: Sequence[Site],
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Stats],
        block_energy: float | None = None,
    ) -> None:
        solved: dict[Site, QuantizedWeight] = {}
        given, rows = [], []
        folds = self._folds(sites, weights, statistics)
        block = sites[0].block
        absorbed = absorb(self.stream, block, sites, folds) if folds and block != -1 else Absorbed()
        for index, site in enumerate(sites):
            self.report(f"solving {unit}", index, len(sites))
            weight, stats, left = weights[site.name], statistics[site.name], folds.get(site.input_id, ())
            if site.name in absorbed.rows:
                weight = weight / absorbed.rows[site.name][:, None]
            if site.input_id in absorbed.inputs:
                weight, stats, left = left[0].into(weight), left[0].stats(stats), left[1:]
            solved[site], row = quantize_matrix(site, weight, stats, self.recipe, block_energy, left)
            given.append((weight, stats))
            rows.append(row)
        self.report(f"solving {unit}", len(sites), len(sites))
        beside = {name: self.stream.parameter(block, name) * factor for name, factor in absorbed.factors.items()}
        if self.recipe.block_tuner is not None and block != -1:
            originals = {site.name: weight for site, (weight, _) in zip(sites, given, strict=True)}
            self._tune(self.recipe.block_tuner, unit, solved, originals, beside)
            for site, row, (weight, stats) in zip(sites, rows, given, strict=True):
                set_errors(row, weight, solved[site], stats)
        self.writer.write_unit(unit, solved, rows, beside)

    def _tune(
        self,
        tuner: Tuner,
        unit: str,
        solved: dict[Site, QuantizedWeight],
        originals: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
    ) -> None:
        """Replace the codes and scales of a block by what `tuner` makes of them. originals: what was solved for.
        beside: what else of the block is new."""
        objective = partial(self.stream.objective, self.stream.block, originals, beside)
        weights: Mapping[str, QuantizedWeight] = {site.name: weight for site, weight in solved.items()}
        for levels in tuner.groups(self.recipe.levels):
            what = f"tuning {unit} at {', '.join(map(str, levels))} bits"
            calls = tuner.calls(len(objective(lambda done: None)), levels)
            called = partial(self._report_tuning, what, calls)
            tuned = tuner.tune(objective(called), weights, levels, Forgetful())
            if tuned.after == tuned.before:
                log.warning("%s gained nothing on the windows kept apart and was given up", what)
            weights = tuned.weights
            called(calls)
        solved |= {site: weights[site.name] for site in solved}

    def _report_tuning(self, what: str, calls: int, done: int) -> None:
        self.report(what, done, calls)

    def _folds(
        self, sites: Sequence[Site], weights: Mapping[str, Tensor], statistics: Mapping[str, Stats]
    ) -> dict[str, tuple[Fold, ...]]:
        """What the recipe's transforms do to every input, by its id."""
        folds: dict[str, tuple[Fold, ...]] = {}
        for name in dict.fromkeys(site.input_id for site in sites if self.recipe.transforms):
            readers = [site for site in sites if site.input_id == name]
            if any(_too_few(site, statistics[site.name]) for site in readers):
                continue
            stats = reduce(Stats.merge, {id(s): s for s in (statistics[site.name] for site in readers)}.values())
            folds[name] = plan_folds(self.recipe, [weights[site.name] for site in readers], stats)
        return folds


def plan_folds(recipe: Recipe, consumers: Sequence[Tensor], stats: Stats) -> tuple[Fold, ...]:
    """What the recipe's transforms do to the input of the matrices `consumers`, whatever their size in all is."""
    power = common_power(consumers, recipe.format.least)
    consumers, folds = [weight / power for weight in consumers], []
    for transform in recipe.transforms:
        folds.append(transform.plan(consumers, stats, recipe.format))
        consumers, stats = [folds[-1].into(weight) for weight in consumers], folds[-1].stats(stats)
    return tuple(folds)


def _unit(block: int) -> str:
    return "embeddings" if block == -1 else f"block-{block:05d}"


def _units(layout: Layout, recipe: Recipe) -> set[str]:
    """Names of all the pieces a finished checkpoint is made of."""
    return {_unit(block) for block in range(-1 if recipe.embeddings else 0, len(layout.blocks))}


def _weighs_gradients(recipe: Recipe) -> bool:
    """Whether statistics tell how far a block's output moves, so that a row's energy is a part of that output."""
    return recipe.token_weights is not None and recipe.token_weights.gradients


def _too_few(site: Site, stats: Stats) -> bool:
    """Whether calibration says too little about the input of a matrix."""
    return stats.count < TOKENS_PER_CHANNEL * site.shape[1] or not stats.total


def quantize_matrix(
    site: Site,
    weight: Tensor,
    stats: Stats,
    recipe: Recipe,
    block_energy: float | None = None,
    folds: tuple[Fold, ...] = (),
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """The quantized `weight` [out, in] behind `folds`, and its row of the level table.

    A matrix that too few tokens reached is rounded to nearest, with a warning. Errors are tr((W - Q) H (W - Q)ᵀ) /
    tr(W H Wᵀ) with the Hessian where it was collected, otherwise with its diagonal. The row's energy is what an error
    of 1 would move, to first order, at the output of the block, per token and as a part of `block_energy`, the squared
    norm of that output: error times energy adds over matrices. It is null where nothing is known.
    """
    fallback = None
    if _too_few(site, stats) and (recipe.splits or recipe.compensators or "hessian" in recipe.solver.needs):
        recipe = Recipe(recipe.format, RoundToNearest())
        if site.role != "embedding":
            fallback = f"rounded to nearest: only {stats.count} calibration tokens reached it"
            log.warning("%s: %s", site.name, fallback)
    try:
        quantized = _solve(weight, stats, recipe, folds)
        if recipe.tuner is not None or recipe.block_tuner is not None:
            codes_of(quantized)
    except ElastiqError as error:
        raise ElastiqError(f"{site.name}: {error}") from error
    if site.expert is not None and quantized.shift(recipe.levels[0]) is not None:
        raise ElastiqError(f"{site.name}: an expert has no output of its own to shift; leave the bias correction out")
    energy, abs_max = _energy(weight, stats), stats.get("abs_max")
    first = quantized.terms[0]
    group_size = first.grid.group_size if isinstance(first, Codes) else getattr(first, "group_size", site.shape[1])
    row = {
        "name": site.name,
        "tensor": site.tensor,
        "role": site.role,
        "block": site.block,
        "shape": list(site.shape),
        "group_size": group_size,
        "tokens": stats.count,
        "dropped": stats.dropped,
        "abs_max": None if abs_max is None or not stats.count else round(float(abs_max.max()), 6),
        "fallback": fallback,
        "energy": energy * stats.total / (stats.count * site.shape[0] * block_energy)
        if block_energy and stats.count
        else None,
        "levels": {str(level): {"num_bits": quantized.num_bits(level)} for level in recipe.levels},
    }
    set_errors(row, weight, quantized, stats)
    return quantized, row


def set_errors(row: dict[str, Any], weight: Tensor, quantized: QuantizedWeight, stats: Stats) -> None:
    """Put the relative output error of every level into a matrix's row of the level table."""
    energy = _energy(weight, stats)
    for level, cell in row["levels"].items():
        cell["error"] = _energy(weight - quantized.dequantize(int(level)), stats) / energy if energy else 0.0


def _solve(weight: Tensor, stats: Stats, recipe: Recipe, folds: tuple[Fold, ...]) -> QuantizedWeight:
    """`weight` [out, in] through the recipe's splits, solver and compensators, all on the inner side of the folds and
    of the powers of two of rows that are too small or too large for them."""
    for fold in folds:
        weight, stats = fold.into(weight), fold.stats(stats)
    powers = RowPowers.of(weight, recipe.format.least)
    weight = weight if powers is None else powers.into(weight)
    rest: Tensor = weight
    apart: tuple[SideTerm, ...] = ()
    for split in recipe.splits:
        rest, terms = split.split(rest, recipe.format, stats)
        apart += terms
    solved = (_as_stored(term, recipe.format) for term in recipe.solver.solve(rest, recipe.format, stats))
    inner = QuantizedWeight((*solved, *apart))
    for compensator in recipe.compensators:
        found = [compensator.fit(weight - inner.dequantize(r), stats, r) for r in recipe.levels]
        inner = QuantizedWeight((*inner.terms, *chain.from_iterable(found)))
    return QuantizedWeight(inner.terms, folds, powers)


def _as_stored(term: Term, format: Format) -> Term:
    """The term with its scales as a reader will see them."""
    if not isinstance(term, Codes) or not isinstance(format, Integer) or format.scales == "half":
        return term
    return replace(term, grid=term.grid.stored(format.scales))


def _energy(matrix: Tensor, stats: Stats) -> float:
    """tr(M H Mᵀ) for M [out, in], or with the diagonal of H where that is all there is."""
    if stats.get("hessian") is not None and stats.total:
        return total((matrix @ stats.mean_hessian()) * matrix)
    return total(matrix.square() @ stats.mean_diagonal(matrix.shape[1]))


def _base(source: ModelSource, edits: Edits, layout: Layout, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer that no unit holds, each once, in the precision the model is stored in."""
    dtype = source.config.dtype if isinstance(source.config.dtype, torch.dtype) else torch.float32
    wide = torch.float32 if dtype == torch.float16 else dtype  # files may hold more than float16 does
    model = build_skeleton(source, wide, edits)
    quantized = {f"{site.name}.weight" if site.expert is None else site.tensor for site in layout.sites}
    if recipe.embeddings:
        quantized |= {f"{site.name}.weight" for site in layout.outer}
    buffers = set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = [name for name, _ in model.named_parameters() if name not in quantized] + sorted(buffers)
    for name in wanted:
        module, _, key = name.rpartition(".")
        load_module(model, module, source, wide, "cpu", recurse=False)
        tensor = getattr(model.get_submodule(module), key).detach()
        yield name, held(tensor, dtype) if tensor.dtype == wide else tensor
        free_module(model, module)


def _config(source: ModelSource, layout: Layout) -> dict[str, Any]:
    """config.json without code; a head that has weights of its own in the files is not called tied."""
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    for key in ("quantization_config", "compression_config"):  # of the source's own arrays; the writer puts in ours
        config.pop(key, None)
    if layout.head is not None and not layout.tied:
        for part, said in ((config, source.config), (config.get("text_config"), source.config.get_text_config())):
            if isinstance(part, dict) and getattr(said, "tie_word_embeddings", False):
                part["tie_word_embeddings"] = False
    return config


def _fingerprint(
    source: ModelSource, recipe: Recipe, calibration: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Everything the bytes of the checkpoint depend on."""
    return {
        "model": source.fingerprint(),
        "recipe": recipe.to_dict(),
        "calibration": calibration,
        "arithmetic": {
            "dtype": str(dtype).removeprefix("torch."),
            "path": native.columns_path(),
            "torch": torch.__version__,
            "elastiq": version("elastiq"),
        },
    }


def _text_facts(ids: Tensor) -> dict[str, Any]:
    digest = sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    return {"text": digest, "windows": len(ids), "seq_len": ids.shape[1]}


def _check_disk(output: Path, needed: int) -> None:
    """Raise ElastiqError unless the disk holds `needed` bytes, what an earlier run left beside `output` included."""
    place = new_place(output)
    parent = next(path for path in place.parents if path.is_dir())
    free = shutil.disk_usage(parent).free + tree_bytes(work_directory(place))
    if free < needed:
        raise ElastiqError(
            f"{parent}: the run needs {needed / 1e9:.2f} GB of free disk and there are {free / 1e9:.2f}; "
            "free some, or choose another output"
        )


def _summary(output: Path, windows: int, begin: float, **facts: Any) -> Summary:
    reader = CheckpointReader(output, verify=False)
    sizes = level_sizes(reader, reader.levels)
    return Summary(
        output=str(output),
        levels={level: {**sizes[level], "error": mean_error(reader.table, level)} for level in reader.levels},
        matrices=len(reader.table),
        windows=windows,
        seconds=time.perf_counter() - begin,
        peak_memory=peak_memory(),
        fallbacks=tuple(row["name"] for row in reader.table if row["fallback"]),
        tuning=reader.info.get("tuning", {}).get("loss", {}),
        **facts,
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
