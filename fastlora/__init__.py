"""fastlora: low-rank adapters for linear layers, with less time and memory. See the README for a first example."""

from fastlora.adapters import (
    active_adapter,
    add_adapter,
    combine_adapters,
    delete_adapter,
    list_adapters,
    set_adapter,
    use_adapter,
)
from fastlora.base_state import base_state_dict, load_base_state_dict
from fastlora.checkpoint import (
    LoadResult,
    get_lora_state_dict,
    load_adapter,
    load_lora_state_dict,
    save_adapter,
)
from fastlora.config import LoRAConfig
from fastlora.conv import LoRAConv
from fastlora.dispatch import Choice
from fastlora.embedding import LoRAEmbedding
from fastlora.errors import (
    BackendError,
    CheckError,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    FastLoRAError,
    InjectionError,
    MergeError,
    TrainingError,
)
from fastlora.exporter import export
from fastlora.fusion import FusionReport, fuse, unfuse
from fastlora.inject import (
    count_parameters,
    freeze_base_params,
    get_lora_params,
    inject_lora,
    print_trainable_parameters,
    setup_lora_for_medical_finetuning,
)
from fastlora.layer import LoRALinear, LoRATransposedLinear
from fastlora.lora_layer import LoRALayer, named_lora_layers
from fastlora.loraplus import loraplus_groups
from fastlora.memory import MemoryEstimate, estimate
from fastlora.merge import MergeReport, merge_lora_weights, merge_report, merged_model
from fastlora.ops import lora_linear
from fastlora.peft import AccelerationReport, accelerate, restore
from fastlora.peft_format import from_pretrained, save_pretrained
from fastlora.selftest import CheckReport, check
from fastlora.survey import LayerTable, explain, preview
from fastlora.switch import disable_adapter

__version__ = "0.1.0"

__all__ = [
    "AccelerationReport",
    "BackendError",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "DataError",
    "ExportError",
    "FastLoRAError",
    "FusionReport",
    "InjectionError",
    "LoRAConfig",
    "LayerTable",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRATransposedLinear",
    "LoadResult",
    "MemoryEstimate",
    "MergeError",
    "MergeReport",
    "TrainingError",
    "__version__",
    "accelerate",
    "active_adapter",
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
    "restore",
    "save_adapter",
    "save_pretrained",
    "set_adapter",
    "setup_lora_for_medical_finetuning",
    "unfuse",
    "use_adapter",
]
