"""The pages of the API reference: which names are on which, made from `fastlora.__all__`."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from mkdocs.exceptions import PluginError

import fastlora

# file name -> title, text and public names of fastlora
TOPICS = {
    "adapt": (
        "Adapt a model",
        "Put adapters into a model and freeze the rest.",
        ["adapt", "inject_lora", "freeze_base_params", "LoRAConfig", "reset_lora_parameters"],
    ),
    "train": (
        "Train",
        "What an optimizer needs, and how layers share work.",
        [
            *("get_trainable_params", "get_lora_params", "count_parameters"),
            *("print_trainable_parameters", "loraplus_groups", "fuse", "unfuse", "FusionReport"),
        ],
    ),
    "save_and_load": (
        "Save and load",
        "Adapters as one file or as tensors by name, and weights of the base model.",
        [
            *("save_adapter", "load_adapter", "get_lora_state_dict", "load_lora_state_dict"),
            *("base_state_dict", "load_base_state_dict", "LoadResult"),
        ],
    ),
    "several_adapters": (
        "Several adapters",
        "Named adapters of one model, and the base model under them.",
        [
            *("add_adapter", "set_adapter", "use_adapter", "use_adapters", "disable_adapter"),
            *("active_adapter", "active_adapters", "list_adapters", "delete_adapter"),
            "combine_adapters",
        ],
    ),
    "merge_and_export": (
        "Merge and export",
        "Plain layers again, and files for other runtimes.",
        ["merged_model", "merge_lora_weights", "merge_report", "MergeReport", "export"],
    ),
    "inspect": (
        "Inspect",
        "What would be adapted, which path a call takes, what it costs, and whether it works.",
        [
            *("preview", "explain", "LayerTable", "Choice", "estimate", "MemoryEstimate"),
            *("check", "CheckReport", "named_lora_layers"),
        ],
    ),
    "peft": (
        "PEFT",
        "PEFT's folders, and fastlora's computation inside models of PEFT.",
        ["save_pretrained", "from_pretrained", "accelerate", "restore", "AccelerationReport"],
    ),
    "layers": (
        "Layers and functional",
        "One adapted layer, and the function that it computes.",
        [
            *("lora_linear", "LoRALinear", "LoRATransposedLinear", "LoRAConv", "LoRAEmbedding"),
            *("LoRAExperts", "LoRATransposedExperts", "ExpertBank"),
            "LoRALayer",
        ],
    ),
    "errors": (
        "Errors",
        "Every error that fastlora raises is a `FastLoRAError`, every warning a `FastLoRAWarning`.",
        [
            *("FastLoRAError", "ConfigError", "InjectionError", "CheckpointError", "MergeError"),
            *("BackendError", "CheckError", "ExportError", "DataError", "TrainingError"),
            "FastLoRAWarning",
        ],
    ),
    "medical": (
        "Medical application",
        "See the [quickstart](../quickstart_training.md) for the commands.",
        ["setup_lora_for_medical_finetuning"],
    ),
}
# Public names that are imported on first access: name -> topic and the module that defines it.
LAZY = {
    "fastlora.FastLoRACallback": ("peft", "fastlora.peft.trainer"),
    "fastlora.medical.MedicalTrainer": ("medical", "fastlora.medical.training.trainer"),
    "fastlora.medical.TS_SAM3D_Dataset": ("medical", "fastlora.medical.data.slices"),
}


class ReferencePage(NamedTuple):
    uri: str
    title: str
    markdown: str


@cache
def reference_pages() -> list[ReferencePage]:
    """The pages in the order of the navigation.

    Raises: PluginError if a public name is on no page, on two, or no longer exists.
    """
    listed = [name for _, _, names in TOPICS.values() for name in names]
    public = set(fastlora.__all__) - {"__version__"}
    for reason, names in {
        "public, but in no topic": public - set(listed),
        "in a topic, but not public": set(listed) - public,
        "in two topics": {name for name in listed if listed.count(name) > 1},
    }.items():
        if names:
            raise PluginError(f"docs/site/reference.py: {reason}: {', '.join(sorted(names))}")
    return [
        ReferencePage(f"reference/{topic}.md", title, _page(topic, title, text, names))
        for topic, (title, text, names) in TOPICS.items()
    ]


def _page(topic: str, title: str, text: str, names: list[str]) -> str:
    parts = [f"# {title}", text, *(f"::: fastlora.{name}" for name in names)]
    for name, (its_topic, module) in LAZY.items():
        if its_topic == topic:
            short = name.rpartition(".")[2]
            parts.append(f"::: {module}.{short}\n    options:\n      heading: {short}")
    return "\n\n".join(parts) + "\n"
