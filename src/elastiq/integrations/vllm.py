"""Nested checkpoints in vLLM: the plugin that its entry point `vllm.general_plugins` loads. Experimental.

Written against vLLM's documented interface for quantization methods from outside and tested against stand-ins of its
base classes; not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

from ..checkpoint.manifest import Manifest
from ..checkpoint.names import QUANT_METHOD
from ..core import ElastiqError
from ..runtime import NestedEmbedding, NestedLinear, NestedMatrix
from ..runtime.stored import StoredMatrix


def register() -> None:
    """What the entry point calls, in every process of vLLM."""
    register_quantization_config(QUANT_METHOD)(ElastiqConfig)


class ElastiqConfig(QuantizationConfig):
    """The quantization_config of a checkpoint. bits: the width to serve, the widest if config.json names none."""

    def __init__(self, manifest: Manifest, bits: int) -> None:
        super().__init__()
        self.manifest = manifest
        self.bits = bits

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ElastiqConfig:
        """Raises ElastiqError for settings that are none, and for widths by name, which fused layers could not keep."""
        manifest = Manifest.from_config({"quantization_config": config}, "config.json")
        bits = config.get("bits") or manifest.widths[-1]
        if bits not in manifest.widths:
            known = ", ".join(map(str, manifest.widths))
            raise ElastiqError(f"vllm: the checkpoint can be read at {known} bits, not {bits!r}; set one of these")
        return cls(manifest, bits)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer, None for one that is not quantized."""
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(leaf, [leaf])]
        found = [self.manifest.matrices[name] for name in names if name in self.manifest.matrices]
        if not found:
            return None
        if len(found) < len(names) or len({matrix.group_size for matrix in found}) > 1:
            raise ElastiqError(f"vllm: {prefix} fuses {', '.join(names)}, which are not quantized alike; mend that")
        if found[0].fused or found[0].transposed:
            raise ElastiqError(f"vllm: {prefix} is of a kind ({found[0].role}) that the plugin does not serve yet")
        if any(matrix.parts or not matrix.coded for matrix in found):
            raise ElastiqError(
                f"vllm: {prefix} is more than nested codes (a rotation, single weights, a low rank, a table), which "
                "the plugin does not serve; quantize with a recipe of codes alone, such as nested"
            )
        if isinstance(layer, VocabParallelEmbedding):
            return EmbeddingMethod(found[0], self.bits, self.manifest.planes)
        return LinearMethod(found[0], self.bits, self.manifest.planes) if isinstance(layer, LinearBase) else None


class LinearMethod(LinearMethodBase):
    """Linear layers, fused or cut over several devices: planes are rows side by side, so shards lie one after another.

    Parameters have the names of the checkpoint's arrays. All planes are loaded; those beyond `bits` are let go.
    """

    def __init__(self, stored: StoredMatrix, bits: int, planes: int) -> None:
        self.stored, self.bits, self.planes = stored, bits, planes

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Raises ElastiqError where the inputs are cut within a byte or a group."""
        if input_size_per_partition != input_size and (
            input_size_per_partition % 8 or input_size_per_partition % self.stored.group_size
        ):
            raise ElastiqError(
                f"vllm: {self.stored.name} cut to {input_size_per_partition} inputs splits a group of "
                f"{self.stored.group_size}; use fewer devices"
            )
        if self.stored.scales != "half":
            raise ElastiqError(
                f"vllm: the scales of {self.stored.name} are stored as {self.stored.scales}, which its loader cannot "
                "cut; quantize with scales in half precision"
            )
        own = StoredMatrix(
            self.stored.name, self.stored.role, (sum(output_partition_sizes), input_size_per_partition),
            self.stored.group_size, self.stored.levels, self.stored.symmetric,
        )  # fmt: skip
        layer.elastiq_stored, layer.elastiq_dtype = own, params_dtype
        for plane in range(1, self.planes + 1):
            for name, (dtype, shape) in own.arrays(plane).items():
                data, loader = torch.zeros(shape, dtype=dtype), extra.get("weight_loader")
                if dtype == torch.uint8:
                    parameter = PackedvLLMParameter(
                        data=data, input_dim=1, output_dim=0, packed_dim=1, packed_factor=8, weight_loader=loader
                    )
                else:
                    parameter = GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
                layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the planes that are read into a nested module, in the order of its products."""
        stored: StoredMatrix = layer.elastiq_stored
        nested = self.nested(stored, layer.elastiq_dtype)
        nested.to(layer.get_parameter("weight").device)
        for plane in range(1, self.planes + 1):
            arrays = {name: layer._parameters.pop(name) for name in stored.arrays(plane)}
            if plane <= self.bits:
                nested.hold({name: array.data for name, array in arrays.items() if array is not None})
        nested.bits = self.bits
        layer.nested = nested

    def nested(self, stored: StoredMatrix, dtype: torch.dtype) -> NestedMatrix:
        return NestedLinear(stored, None, dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product: Tensor = layer.nested.product(x, bias)
        return product


class EmbeddingMethod(LinearMethod):
    """An embedding table, and the output head that is tied to it or has its own matrix."""

    def nested(self, stored: StoredMatrix, dtype: torch.dtype) -> NestedMatrix:
        return NestedEmbedding(stored, dtype)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        rows: Tensor = layer.nested(input_)
        return rows

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """The head of a tied model is its embedding: one table, one width."""
        return embed_tokens
