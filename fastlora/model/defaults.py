"""The default targets: which layers get an adapter if no target is given. Rules on the structure of modules, documented in docs/targets.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fastlora.layers.base import LoRALayer
from fastlora.layers.kinds import kind_of


@dataclass(frozen=True)
class Rule:
    """A rule that finds one naming of attention projections. It looks at the direct children of a module.

    name: shown by `preview`.
    fires_on: alternatives; the rule fires on a module that has every child of one of them, each a linear layer or a container of some.
    chooses: the children whose linear layers get an adapter, as far as the module has them.
    found_in: examples, for the documentation.
    output_beside: the output projection is `output.dense` of the parent, unless the parent also has `intermediate`, beside which
        `output.dense` belongs to the feed-forward network.
    """

    name: str
    fires_on: tuple[tuple[str, ...], ...]
    chooses: tuple[str, ...]
    found_in: str
    output_beside: bool = False


_TO = ("to_qkv", "to_q", "to_k", "to_v", "to_kv", "to_out")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_added_qkv", "to_add_out")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")

# In order: on one module only the first that fires counts. Different modules of a model may fire different rules.
RULES = (
    Rule(
        "to_q",
        (("to_qkv",), ("to_q", "to_kv"), ("to_q", "to_k", "to_v")),
        (*_TO, *_ADDED),
        "diffusers (UNet, DiT, PixArt, SD3, Flux), fastlora's medical models",
    ),
    Rule(
        "q_proj",
        (("q_proj", "v_proj"), ("q_proj", "kv_b_proj"), ("q_b_proj", "kv_b_proj")),
        ("q_proj", "k_proj", "v_proj", *_LATENT, "o_proj", "out_proj", "output_proj"),
        "Llama, Mistral, Qwen, Gemma, OPT, GPT-J, DeepSeek, CLIP, Whisper, SAM's decoder, torchtune; ViT, DINOv2, BEiT and Swin of "
        "transformers 5",
    ),
    Rule("qkv_proj", (("qkv_proj",),), ("qkv_proj", "o_proj", "out_proj"), "Phi-3"),
    Rule(
        "query_key_value",
        (("query_key_value",),),
        ("query_key_value", "dense"),
        "GPT-NeoX, Falcon, BLOOM",
    ),
    Rule("c_attn", (("c_attn", "c_proj"),), ("c_attn", "q_attn", "c_proj"), "GPT-2"),
    Rule("Wqkv", (("Wqkv",),), ("Wqkv", "Wo", "out_proj"), "ModernBERT, MPT"),
    Rule(
        "qkv",
        (("qkv",),),
        ("qkv", "proj"),
        "timm's ViT and Swin, DINOv2's own code, SAM's encoder, Qwen-VL's encoder",
    ),
    Rule(
        "query",
        (("query", "key", "value"), ("query_proj", "key_proj", "value_proj")),
        ("query", "key", "value", "query_proj", "key_proj", "value_proj", "dense"),
        "BERT, RoBERTa, ALBERT, DeBERTa",
        output_beside=True,
    ),
    Rule(
        "q_lin",
        (("q_lin", "k_lin", "v_lin"),),
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        "DistilBERT, XLM",
    ),
    Rule("q", (("q", "k", "v"), ("q", "kv")), ("q", "k", "v", "kv", "o", "proj"), "T5"),
    Rule("wq", (("wq", "wk", "wv"),), ("wq", "wk", "wv", "wo"), "Meta's own code of Llama"),
)

# The matrices of its queries, keys and values are parameters of the module, not layers.
MULTIHEAD = Rule(
    "nn.MultiheadAttention",
    (),
    ("out_proj",),
    "torch's TransformerEncoderLayer and TransformerDecoderLayer, torchvision's ViT",
)


def default_layers(model: nn.Module) -> dict[nn.Module, Rule]:
    """Every layer that some rule chooses, with that rule. Adapted layers count as layers. Nothing is changed."""
    fired = {module: rule for module in model.modules() if (rule := _rule_of(module)) is not None}
    chosen: dict[nn.Module, Rule] = {}
    for module, rule in fired.items():
        for name in rule.chooses:
            for layer in _linears(module._modules.get(name)):
                chosen.setdefault(layer, rule)
    for parent in model.modules():
        output = parent._modules.get("output")
        if output is None or "intermediate" in parent._modules:
            continue
        for child in parent.children():
            if child in fired and fired[child].output_beside:
                for layer in _linears(output._modules.get("dense")):
                    chosen.setdefault(layer, fired[child])
    return chosen


def _rule_of(module: nn.Module) -> Rule | None:
    """The first rule that fires on the module."""
    if isinstance(module, nn.MultiheadAttention):
        return MULTIHEAD
    present = {name for name, child in module._modules.items() if any(_linears(child))}
    return next(
        (rule for rule in RULES if any(present.issuperset(names) for names in rule.fires_on)), None
    )


def _linears(child: nn.Module | None) -> Iterator[nn.Module]:
    """The linear layers that a child is or contains, such as 0 of `to_out`, a list of a layer and dropout."""
    if child is None:
        return
    if isinstance(child, LoRALayer) or kind_of(child) == "linear":
        yield child
        return
    if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        for below in child.children():
            yield from _linears(below)
