"""fastlora: LoRA fine-tuning for PyTorch. README.md has an example."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from fastlora.config import LoRAConfig
from fastlora.errors import (
    BackendError,
    CheckError,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    FastLoRAError,
    FastLoRAWarning,
    InjectionError,
    MergeError,
    TrainingError,
)
from fastlora.installation import warn_of_namesakes
from fastlora.io.adapter_file import (
    LoadResult,
    get_lora_state_dict,
    load_adapter,
    load_lora_state_dict,
    save_adapter,
)
from fastlora.io.base_state import base_state_dict, load_base_state_dict
from fastlora.io.exporter import export
from fastlora.layers.banks import ExpertBank
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.conv import LoRAConv
from fastlora.layers.embedding import LoRAEmbedding
from fastlora.layers.experts import LoRAExperts, LoRATransposedExperts
from fastlora.layers.linear import LoRALinear, LoRATransposedLinear
from fastlora.model.activate import (
    active_adapter,
    active_adapters,
    set_adapter,
    use_adapter,
    use_adapters,
)
from fastlora.model.adapters import add_adapter, combine_adapters, delete_adapter, list_adapters
from fastlora.model.fusion import FusionReport, fuse, unfuse
from fastlora.model.inject import (
    adapt,
    count_parameters,
    freeze_base_params,
    get_lora_params,
    get_trainable_params,
    inject_lora,
    print_trainable_parameters,
    reset_lora_parameters,
    setup_lora_for_medical_finetuning,
)
from fastlora.model.loraplus import loraplus_groups
from fastlora.model.merge import MergeReport, merge_lora_weights, merge_report, merged_model
from fastlora.model.switch import disable_adapter
from fastlora.ops.dispatch import Choice
from fastlora.ops.linear import lora_linear
from fastlora.peft import whole_model as _whole_model  # noqa: F401
from fastlora.peft.accelerate import AccelerationReport, accelerate, restore
from fastlora.peft.pretrained import from_pretrained, save_pretrained
from fastlora.report.check import CheckReport, check
from fastlora.report.layer_table import LayerTable, explain, preview
from fastlora.report.memory import MemoryEstimate, estimate

if TYPE_CHECKING:
    from fastlora.peft.trainer import FastLoRACallback as FastLoRACallback

__version__ = "0.1.0"

warn_of_namesakes(_Path(__file__).parent)

__all__ = [
    "AccelerationReport",
    "BackendError",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "DataError",
    "ExpertBank",
    "ExportError",
    "FastLoRAError",
    "FastLoRAWarning",
    "FusionReport",
    "InjectionError",
    "LoRAConfig",
    "LayerTable",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALayer",
    "LoRALinear",
    "LoRATransposedExperts",
    "LoRATransposedLinear",
    "LoadResult",
    "MemoryEstimate",
    "MergeError",
    "MergeReport",
    "TrainingError",
    "__version__",
    "accelerate",
    "active_adapter",
    "active_adapters",
    "adapt",
    "add_adapter",
    "base_state_dict",
    "check",
    "combine_adapters",
    "count_parameters",
    "delete_adapter",
    "disable_adapter",
    "estimate",
    "explain",
    "export",
    "freeze_base_params",
    "from_pretrained",
    "fuse",
    "get_lora_params",
    "get_lora_state_dict",
    "get_trainable_params",
    "inject_lora",
    "list_adapters",
    "load_adapter",
    "load_base_state_dict",
    "load_lora_state_dict",
    "lora_linear",
    "loraplus_groups",
    "merge_lora_weights",
    "merge_report",
    "merged_model",
    "named_lora_layers",
    "preview",
    "print_trainable_parameters",
    "reset_lora_parameters",
    "restore",
    "save_adapter",
    "save_pretrained",
    "set_adapter",
    "setup_lora_for_medical_finetuning",
    "unfuse",
    "use_adapter",
    "use_adapters",
]


def __getattr__(name: str) -> Any:
    if name == "FastLoRACallback":  # needs transformers
        from fastlora.peft.trainer import FastLoRACallback

        return FastLoRACallback
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
