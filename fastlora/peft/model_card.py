"""The model card of a folder in PEFT's format: `README.md` with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastlora.errors import first_few
from fastlora.model.peft_rules import PeftConfig
from fastlora.peft.config import CONFIG_FILE
from fastlora.peft.hub import is_hub_id

CARD_FILE = "README.md"
_MARK = "<!-- written by fastlora; sha256 of the lines above: {} -->\n"
_ENDS_WITH_MARK = re.compile(_MARK.format("([0-9a-f]{64})"))
_LIBRARIES = ("diffusers", "transformers")  # whose classes PEFT's AutoPeftModel builds
_AUTO = {  # FEATURE_EXTRACTION is AutoModel itself
    "CAUSAL_LM": "ForCausalLM",
    "QUESTION_ANS": "ForQuestionAnswering",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
}


def model_card(config: PeftConfig) -> bytes:
    """The card: metadata in YAML, how to load the adapter, its settings, and a last line by which `may_replace` recognises it."""
    text = "\n".join(
        [*_metadata(config), "", *_usage(config), "", *_hyperparameters(config), "", ""]
    )
    return (text + _MARK.format(_digest(text))).encode()


def may_replace(file: Path) -> bool:
    """Whether there is no such file, or it is a card that fastlora wrote and nobody has changed since.

    Raises: OSError if the file cannot be read.
    """
    if not os.path.lexists(file):
        return True
    if file.is_symlink() or not file.is_file():
        return False
    text = file.read_bytes().decode(errors="replace")
    start = text.rfind("<!-- ")
    found = _ENDS_WITH_MARK.fullmatch(text[start:]) if start >= 0 else None
    return found is not None and found[1] == _digest(text[:start])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _base_id(config: PeftConfig) -> str | None:
    """The base model's id on the Hub; None for a local path, which the Hub refuses as `base_model`."""
    name = config.base_model_name_or_path
    return name if name and is_hub_id(name) and not os.path.exists(name) else None


def _metadata(config: PeftConfig) -> list[str]:
    base, library = _base_id(config), _base_class(config)[0]
    lines = ["---"]
    if base is not None:
        lines.append(f"base_model: {_quoted(base)}")
    lines.append("library_name: peft")
    if config.task_type == "CAUSAL_LM":
        lines.append("pipeline_tag: text-generation")
    tags = [f"base_model:adapter:{base}"] if base is not None else []
    tags += ["fastlora", "lora"]
    tags += [name for name in _LIBRARIES if name == library.partition(".")[0]]
    return [*lines, "tags:", *(f"- {_quoted(tag)}" for tag in tags), "---"]


def _base_class(config: PeftConfig) -> tuple[str, str]:
    """(module, name) of the class that builds the base model; empty if unknown."""
    if config.task_type is not None:
        return "transformers", f"AutoModel{_AUTO.get(config.task_type, '')}"
    found = config.auto_mapping or {}
    return found.get("parent_library", ""), found.get("base_model_class", "")


def _quoted(text: str) -> str:
    """A string of YAML, in ASCII."""
    plain = [c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text]
    return f'"{"".join(plain)}"'


def _usage(config: PeftConfig) -> list[str]:
    """How to load the folder in PEFT and in fastlora."""
    module, name = _base_class(config)
    base, here = config.base_model_name_or_path, '"the path or id of this folder"'
    # PEFT imports classes of a few packages only.
    automatic = base is not None and module.partition(".")[0] in _LIBRARIES
    imported = [f"from {module} import {name}"] if automatic else []
    build = f"{name}.from_pretrained({base!a})" if automatic else "...  # the base model"
    auto = f"AutoPeftModel{name.removeprefix('AutoModel') or 'ForFeatureExtraction'}"
    auto = auto if config.task_type is not None else "AutoPeftModel"
    theirs = [f"from peft import {auto}", "", f"model = {auto}.from_pretrained({here})"]
    if not automatic:
        theirs = ["from peft import PeftModel", "", f"base = {build}"]
        theirs += [f"model = PeftModel.from_pretrained(base, {here})"]
    ours = [*imported, "import fastlora", "", f"model = {build}"]
    ours += [f"fastlora.from_pretrained(model, {here})"]
    return [
        "# LoRA adapter",
        "",
        f"Base model: {'unknown' if base is None else f'`{base!a}`'}. With [PEFT](https://huggingface.co/docs/peft):",
        "",
        *("```python", *theirs, "```"),
        "",
        "With fastlora:",
        "",
        *("```python", *ours, "```"),
    ]


def _hyperparameters(config: PeftConfig) -> list[str]:
    """A table of the settings; those by layer are in the config beside the card."""
    targets, heads = config.target_modules, config.modules_to_save
    shown = [targets] if isinstance(targets, str) else targets
    rows = {
        "rank": f"{config.r}",
        "alpha": f"{config.lora_alpha:g}",
        "dropout": f"{config.lora_dropout:g}",
        "rsLoRA": "yes" if config.use_rslora else "no",
        "DoRA": "yes" if config.use_dora else "no",
        "adapted layers": _code(shown),
        "trained in full": _code(heads) if heads else "nothing",
    }
    if config.rank_pattern or config.alpha_pattern:
        rows["rank and alpha of single layers"] = f"in `{CONFIG_FILE}`"
    lines = ["| setting | value |", "| --- | --- |"]
    return lines + [f"| {name} | {value} |" for name, value in rows.items()]


def _code(names: Sequence[str]) -> str:
    """The first few names in a cell of a table."""
    return first_few([f"`{name.replace('|', chr(92) + '|')}`" for name in names])
