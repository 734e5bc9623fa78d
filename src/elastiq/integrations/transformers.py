"""`AutoModelForCausalLM.from_pretrained` on a nested checkpoint, once `import elastiq` was said.

Without the import transformers stops at the first matrix, whose first plane has another shape than its weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import CheckpointReader
from ..checkpoint.manifest import Manifest
from ..checkpoint.names import BASE, CHECKSUMS, QUANT_METHOD, plane_file
from ..checkpoint.tensors import read_header
from ..core import ElastiqError, LevelMap
from ..inference.attached import attach, saved_width, state_of
from ..inference.loading import Widths, plain_widths, untie_stored
from ..runtime import accelerate, keep_a_parameter, nested_matrices, swap, take_turns


@register_quantization_config(QUANT_METHOD)
class ElastiqConfig(QuantizationConfigMixin):
    """What config.json says about the quantization, and the width to load.

    bits: one width, or {matrix name: width} with the rest at the widest; None is the widest the directory gives. Given
    to `from_pretrained` as `quantization_config=ElastiqConfig(bits=3)`. As many planes are loaded as it needs;
    `elastiq.set_bits` reads further ones from the directory.
    """

    planes: int

    def __init__(self, bits: Widths | None = None, quant_method: str = QUANT_METHOD, **manifest: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # a string for methods from outside
        self.bits = plain_widths(dict(bits.widths) if isinstance(bits, LevelMap) else bits)
        self.__dict__.update(manifest)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to `from_pretrained` overrides in that of the checkpoint."""
        return {"bits": self.bits}

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        return {key: value for key, value in data.items() if key != "bits" or value is not None}


# transformers honours a config passed beside that of a checkpoint only for the types it lists, and cannot be told.
if ElastiqConfig not in getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", (ElastiqConfig,)):
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (ElastiqConfig,)  # type: ignore[assignment]


@register_quantizer(QUANT_METHOD)
class ElastiqQuantizer(HfQuantizer):
    """Puts nested modules with the checkpoint's array names into the tree before the weights are loaded."""

    requires_calibration = True
    quantization_config: ElastiqConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        where = str(files[0].parent) if files else "the checkpoint"
        manifest = Manifest.from_config({"quantization_config": self.quantization_config.to_dict()}, where)
        widths = _widths(manifest, self.quantization_config.bits, where)
        self._reader = _reader(files)
        planes = manifest.planes if self._reader is None else max(widths.values())
        stored = _stored_arrays(files, manifest, planes, where)
        if self._reader is not None:
            self._reader.check_side_files()
            for name in (BASE, *(plane_file(plane) for plane in range(1, planes + 1))):
                self._reader.check(name)
        _make_buffers_real(model, [m.name for m in manifest.matrices.values() if m.role == "embedding"])
        _tie(model)
        untie_stored(model, stored)
        for matrix in manifest.matrices.values():
            swap(model, matrix)
        for name, module in nested_matrices(model).items():
            for plane in range(1, planes + 1):
                for key, (dtype, shape) in manifest.matrices[name].arrays(plane).items():
                    module.register_buffer(key, torch.empty(shape, dtype=dtype, device="meta"))
        model.set_experts_implementation("eager")  # which asks for one expert after another
        model.all_tied_weights_keys = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if _has_parameter(model, target) and _has_parameter(model, source)
        }
        unread = {name for p in range(planes + 1, manifest.planes + 1) for name in manifest.plane_arrays(p)}
        ignored = {f"^{re.escape(name)}$" for name in unread}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        self.quantization_config.planes = planes
        self._bits = widths

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, matrix in nested_matrices(model).items():
            for plane in range(1, self.quantization_config.planes + 1):
                matrix.hold({key: cast(Tensor, matrix._buffers.pop(key)) for key in matrix.stored.arrays(plane)})
            matrix.bits = self._bits[name]
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float16 and not bool(torch.isfinite(parameter).all()):
                raise ElastiqError(f"{name}: it holds numbers that float16 cannot; load with dtype=torch.bfloat16")
        attach(model, self._reader)
        keep_a_parameter(model)
        accelerate(model)
        take_turns(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Everything in the checkpoint's order; config.json has to name the width in use."""
        self.quantization_config.bits = saved_width(model)
        self.quantization_config.planes = max(matrix.max_bits for matrix in nested_matrices(model).values())
        return state_of(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained; the planes cannot."""
        return True


def _widths(manifest: Manifest, bits: Widths | None, where: str) -> dict[str, int]:
    """Width of every matrix. Raises ElastiqError for a name or a width that the checkpoint does not have."""
    widest = manifest.widths[-1]
    if not (bits is None or isinstance(bits, int | Mapping)):
        raise ElastiqError(f"{where}: bits={bits!r:.60} is no width and no table of widths; use elastiq.load for these")
    widths = dict.fromkeys(manifest.matrices, bits if isinstance(bits, int) else widest)
    for name, width in (bits if isinstance(bits, Mapping) else {}).items():
        if name not in manifest.matrices:
            raise ElastiqError(f"{name}: no quantized matrix of {where} has this name; see modules in config.json")
        if isinstance(width, str):
            raise ElastiqError(f"{name}: widths of rows or experts are not loaded by transformers; use elastiq.load")
        widths[name] = width
    for width in widths.values():
        if width not in manifest.widths:
            given = ", ".join(map(str, manifest.widths))
            raise ElastiqError(f"{where}: it can be read at {given} bits, not {width}; ask for one of these")
    return widths


def _stored_arrays(files: list[Path], manifest: Manifest, planes: int, where: str) -> set[str]:
    """Names of all arrays in the files. Raises ElastiqError unless those of the first `planes` planes are as promised.

    transformers itself would only warn of a missing array and make one up.
    """
    found = {name: entry.spec for file in files for name, entry in read_header(file)[0].items()}
    for plane in range(1, planes + 1):
        for name, spec in manifest.plane_arrays(plane).items():
            if found.get(name) != spec:
                state = "absent" if name not in found else f"{found[name][0]} {list(found[name][1])}"
                promised = f"{spec[0]} {list(spec[1])}"
                raise ElastiqError(f"{where}: {name} is {state}, config.json says {promised}; get it again")
    return set(found)


def _reader(files: list[Path]) -> CheckpointReader | None:
    """A reader of the directory the files are in, if elastiq wrote it (and not `save_pretrained`)."""
    directory = files[0].parent if files else None
    return CheckpointReader(directory) if directory is not None and (directory / CHECKSUMS).is_file() else None


def _tie(model: PreTrainedModel) -> None:
    """Make tied parameters one object, which transformers leaves for after the weights."""
    for target, source in model.all_tied_weights_keys.items():
        module, _, key = target.rpartition(".")
        model.get_submodule(module)._parameters[key] = model.get_parameter(source)


def _make_buffers_real(model: PreTrainedModel, names: list[str]) -> None:
    """Give buffers of the modules `names` that transformers has left without values those of a model just built."""
    wanted = [
        name for name in names if any(buffer.is_meta for buffer in model.get_submodule(name).buffers(recurse=False))
    ]
    if not wanted:
        return
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        twin = type(model)(copy.deepcopy(model.config))
    for name in wanted:
        model.get_submodule(name)._buffers.update(twin.get_submodule(name)._buffers)


def _has_parameter(model: nn.Module, name: str) -> bool:
    module, _, key = name.rpartition(".")
    return key in model.get_submodule(module)._parameters
