"""Names of layers in kohya's files, which write a path with underscores: `lora_unet_mid_block_attentions_0_proj_in`.

Where a path has underscores of its own, the name alone does not tell them from dots. It is resolved by the keys of a base model, or
else by the names that modules have in the models that such files are made for.

Source: https://github.com/kohya-ss/sd-scripts (networks/lora.py), diffusers.loaders.lora_conversion_utils.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from fastlora.errors import CheckpointError, nearest

# Beginning of a name in the file -> model in a pipeline of diffusers.
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
COMPONENTS = (
    *("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("controlnet", "prior"),
)
"""The models of a pipeline, by which the paths of a state may begin."""

# Names of modules that have an underscore, and those that follow or precede one.
_MODULES = """
down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks attn attn1 attn2 ff net proj
to_q to_k to_v to_out to_qkv proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj norm norm1 norm2 norm3
time_embedding add_embedding linear linear_1 linear_2 motion_modules temporal_transformer
input_blocks middle_block output_blocks in_layers emb_layers out_layers skip_connection op time_embed label_emb
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
block layer SelfAttention DenseReluDense EncDecAttention q k v o wi wi_0 wi_1 wo
single_transformer_blocks norm1_context ff_context add_q_proj add_k_proj add_v_proj to_add_out proj_mlp context_embedder x_embedder
time_text_embed timestep_embedder guidance_embedder text_embedder
double_blocks single_blocks joint_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod qkv linear1 linear2 lin modulation
img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer x_block context_block adaLN_modulation
"""
_SEGMENTS = {tuple(name.split("_")): name for name in _MODULES.split()} | {("out", "2"): "out.2"}
_LONGEST = max(map(len, _SEGMENTS))
_OF_TRANSFORMERS = re.compile(
    r"(double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks)\."
)
# Stability AI's names inside a block -> diffusers'.
_INSIDE = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)")


def is_kohya(key: str) -> bool:
    """Whether a key begins as those of kohya's files."""
    return key.startswith(tuple(_PREFIXES))


def resolve(
    names: Iterable[str], bases: Mapping[str, set[str]]
) -> tuple[dict[str, str], list[str]]:
    """(name → path that begins with its component, the names that no table knows: their paths keep the underscores).

    names: of layers, as `lora_te1_text_model_…`. bases: component → paths of its layers; the component "" is any.

    Raises: CheckpointError if a base has other layers of a component but not this one, if its keys give a name two meanings, or if two
    names have one path.
    """
    split = {name: next(p for p in _PREFIXES if name.startswith(p)) for name in names}
    paths: dict[str, str] = {}
    unknown = []
    for prefix in dict.fromkeys(split.values()):
        inner = [name.removeprefix(prefix) for name, own in split.items() if own == prefix]
        component, found = _PREFIXES[prefix], None
        if prefix == "lora_unet_" and "unet" not in bases and "transformer" in bases:
            component = "transformer"
        for base in (component, ""):
            found = found or _of_base(inner, bases.get(base, set()))
        for name in inner:
            path = found[name] if found else _of_table(name)
            if path is None:
                unknown.append(prefix + name)
                path = name
            owner = component
            if prefix == "lora_unet_" and _OF_TRANSFORMERS.match(path):
                owner = "transformer"
            paths[prefix + name] = f"{owner}.{path}"
    taken: dict[str, str] = {}
    for name, path in paths.items():
        if taken.setdefault(path, name) != name:
            raise CheckpointError(f"{taken[path]} and {name} are both {path}")
    return paths, unknown


def _of_base(names: list[str], layers: set[str]) -> dict[str, str] | None:
    """Name → path in a base, or None if the base has none of them."""
    meanings: dict[str, list[str]] = {}
    for layer in sorted(layers):
        meanings.setdefault(layer.replace(".", "_"), []).append(layer)
    found, missing = {}, []
    for name in names:
        known = meanings.get(name, [])
        if len(known) > 1:
            raise CheckpointError(f"{name} may be {' or '.join(known)}, which are both in the base")
        other = _of_table(name)
        if known:
            found[name] = known[0]
        elif other in layers and other is not None:
            found[name] = other
        else:
            missing.append(name)
    if found and missing:
        close = nearest(missing[0], meanings)
        raise CheckpointError(f"{missing[0]}: is not a layer of the base{close}")
    return found or None


def _of_table(name: str) -> str | None:
    """The path of a name, in diffusers' names where they are known; None if a part of it is no known module."""
    segments = _parse(tuple(name.split("_")))
    return None if segments is None else _as_diffusers(".".join(segments))


@lru_cache(maxsize=1 << 16)
def _parse(words: tuple[str, ...]) -> tuple[str, ...] | None:
    """The modules of which the words are made, each as long as possible, or None."""
    if not words:
        return ()
    for length in range(min(_LONGEST, len(words)), 0, -1):
        head = words[:length]
        segment = _SEGMENTS.get(head) or (words[0] if length == 1 and words[0].isdecimal() else "")
        rest = _parse(words[length:]) if segment else None
        if rest is not None:
            return (segment, *rest)
    return None


def _as_diffusers(path: str) -> str:
    """A path of Stability AI's U-Net for SDXL, whose blocks have two layers, under diffusers' name; others as they are."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    block = _BLOCK.fullmatch(path)
    if block:
        side, index, inner, rest = block[1], int(block[2]), int(block[3]), block[4]
        index, down = index - (side == "input_blocks"), "down" if side == "input_blocks" else "up"
        if rest == "op":
            module, rest = "downsamplers.0", "conv"
        elif inner > 1 or rest == "conv":
            module = "upsamplers.0"
        else:
            module = f"{('resnets', 'attentions')[inner]}.{index % 3}"
        return f"{down}_blocks.{index // 3}.{module}.{_INSIDE.get(rest, rest)}"
    middle, _, rest = path.removeprefix("middle_block.").partition(".")
    if path.startswith("middle_block.") and middle in _MIDDLE:
        return f"mid_block.{_MIDDLE[middle]}.{_INSIDE.get(rest, rest)}"
    return path


def kohya_names(paths: Iterable[str]) -> dict[str, str]:
    """Path that begins with its component → name in kohya's file.

    Raises: CheckpointError if a component has no name there, or if two paths have one name.
    """
    paths = list(paths)
    several = any(path.startswith("text_encoder_2.") for path in paths)
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if several else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for path in paths:
        component, _, inner = path.partition(".")
        if component not in prefixes or not inner:
            raise CheckpointError(
                f"{path}: kohya's files hold layers of {', '.join(prefixes)}; those of transformers have the names of their original "
                "models. Name the model with --component if the paths do not begin with it"
            )
        names[path] = prefixes[component] + inner.replace(".", "_")
        if taken.setdefault(names[path], path) != path:
            raise CheckpointError(f"{taken[names[path]]} and {path} have one name in kohya's files")
    return names
