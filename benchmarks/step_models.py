"""The models of `model_step.py`, and what trains each of them: fastlora, PEFT, and full fine-tuning, plain or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

import fastlora
from fastlora.benchmark.implementations import NotApplicable

RANK, ALPHA, DROPOUT = 8, 16, 0.1
COMPILER = "inductor"


@dataclass(frozen=True)
class Model:
    """A model to train.

    make: builds the base model in float32. inputs: builds its keyword arguments for two sizes, which are `on_cpu` or `on_gpu`.
    targets: names of the adapted layers. full_on_cpu: whether full fine-tuning fits in a CPU's memory.
    banks: names of adapted banks of experts, PEFT's `target_parameters`. dropout: of the adapters; PEFT allows none with banks.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    on_cpu: tuple[int, int]
    on_gpu: tuple[int, int]
    targets: tuple[str, ...]
    full_on_cpu: bool
    banks: tuple[str, ...] = ()
    dropout: float = DROPOUT

    def size(self, device: torch.device) -> tuple[int, int]:
        return self.on_gpu if device.type == "cuda" else self.on_cpu


@dataclass(frozen=True)
class Contestant:
    """What trains a model. library: "fastlora", "peft" or "full". float32_adapters: otherwise they have the base weights' dtype."""

    library: str
    float32_adapters: bool = True
    fused: bool = False
    compiled: bool = False


CONTESTANTS = {
    "fastlora": Contestant("fastlora"),
    "fastlora-fused": Contestant("fastlora", fused=True),
    "peft": Contestant("peft"),
    "fastlora-bf16": Contestant("fastlora", float32_adapters=False),
    "peft-bf16": Contestant("peft", float32_adapters=False),
    "full": Contestant("full"),
    "fastlora-compiled": Contestant("fastlora", compiled=True),
    "peft-compiled": Contestant("peft", float32_adapters=False, compiled=True),
}
CPU_CONTESTANTS = ("fastlora", "fastlora-fused", "peft", "full")


def llama(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        use_cache=False,
    )
    return LlamaModel(config)


def qwen3_moe(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int, int],
    experts: tuple[int, int],
) -> nn.Module:
    """heads: those of queries, those of keys and values, and their size. experts: all, and those of a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        num_experts=experts[0],
        num_experts_per_tok=experts[1],
        use_cache=False,
    )
    config.head_dim = heads[2]
    return Qwen3MoeModel(config)


def vit_b() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(), add_pooling_layer=False)


def images(count: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, size, size)}


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(rows * length).view(rows, length) * 7 % 256}


LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
BANKS = ("experts.gate_up_proj", "experts.down_proj")
VIT_LAYERS = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
MODELS = {
    "vit-b": Model(vit_b, images, (4, 224), (64, 224), VIT_LAYERS, True),
    "llama-1b": Model(
        lambda: llama(2048, 8192, 16, 32, 8), tokens, (1, 128), (4, 1024), LLAMA_LAYERS, False
    ),
    "llama-tiny": Model(
        lambda: llama(32, 64, 2, 4, 2), tokens, (1, 16), (1, 16), LLAMA_LAYERS, True
    ),
    "qwen3-moe": Model(
        lambda: qwen3_moe(512, 256, 4, (8, 4, 64), (32, 4)),
        tokens,
        (4, 128),
        (8, 1024),
        MOE_LAYERS,
        True,
        BANKS,
        0.0,
    ),
    # blocks of Qwen3-30B-A3B
    "qwen3-moe-2b": Model(
        lambda: qwen3_moe(2048, 768, 4, (32, 4, 128), (128, 8)),
        tokens,
        (1, 64),
        (4, 1024),
        MOE_LAYERS,
        False,
        BANKS,
        0.0,
    ),
    "qwen3-moe-tiny": Model(
        lambda: qwen3_moe(32, 16, 2, (4, 2, 8), (8, 4)),
        tokens,
        (1, 16),
        (1, 16),
        MOE_LAYERS,
        True,
        BANKS,
        0.0,
    ),
}


@contextmanager
def without_dense_masks() -> Iterator[None]:
    """Leave masks to the attention itself; within a CUDA graph transformers would build and use dense ones."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3_moe import modeling_qwen3_moe
    from transformers.models.vit import modeling_vit

    with ExitStack() as stack:
        for module, name in (
            (modeling_llama, "create_causal_mask"),
            (modeling_qwen3_moe, "create_causal_mask"),
            (modeling_vit, "create_bidirectional_mask"),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda *args, **kwargs: None))
        yield


def base_model(
    model: Model, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base model with frozen random weights of this dtype, in training mode, and its inputs."""
    with device:
        base, inputs = model.make(), model.inputs(*model.size(device))
    for parameter in base.parameters():  # buffers, such as rotary frequencies, stay float32
        parameter.data = parameter.data.to(dtype)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return base.requires_grad_(False).train(), inputs


def adapted(name: str, model: Model, base: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """The model trained by contestant `name`; it shares the weights of `base` unless it trains them.

    Raises: NotApplicable if it would be the same as another contestant.
    """
    contestant = CONTESTANTS[name]
    dtype = next(base.parameters()).dtype
    narrow = contestant.library != "full" and not contestant.float32_adapters
    if narrow and dtype == torch.float32 and not contestant.compiled:
        raise NotApplicable(f"the weights are float32: identical to {contestant.library}")
    mine = _copy(model, base, shared=contestant.library != "full")
    if contestant.library == "full":
        return mine.requires_grad_(True)
    names = {path.rpartition(".")[2] for path, _ in mine.named_modules()}
    targets = [target for target in model.targets if target in names]
    if contestant.library == "peft":
        import peft

        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=model.dropout,
            target_modules=targets,
            target_parameters=list(model.banks) or None,
        )
        mine = peft.get_peft_model(mine, config, autocast_adapter_dtype=not narrow)
    else:
        adapters = dtype if narrow else torch.float32
        fastlora.inject_lora(
            mine,
            fastlora.LoRAConfig(
                [*targets, *model.banks],
                RANK,
                ALPHA,
                model.dropout,
                match="exact",
                adapter_dtype=adapters,
            ),
        )
        fastlora.freeze_base_params(mine)
    if contestant.fused:
        fastlora.fuse(mine, **inputs)
    if contestant.compiled:
        # Block by block, as is usual for models of equal blocks: one compilation serves them all.
        lists = (part for part in mine.modules() if isinstance(part, nn.ModuleList))
        for block in max(lists, key=len):
            block.compile(backend=COMPILER, dynamic=False)
    return mine


def _copy(model: Model, base: nn.Module, *, shared: bool) -> nn.Module:
    with torch.device("meta"):
        mine = model.make()
    state = base.state_dict(keep_vars=False)
    if not shared:
        state = {key: value.clone() for key, value in state.items()}
    mine.load_state_dict(state, assign=True)
    for key, buffer in base.named_buffers():  # some are not in the state dict
        owner, _, last = key.rpartition(".")
        mine.get_submodule(owner)._buffers[last] = buffer
    return mine.requires_grad_(False).train()
