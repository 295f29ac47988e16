"""Small, randomly initialised mixtures of experts of transformers 5."""

import pytest
import torch

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_EIGHT = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
IDS = torch.tensor([[1, 5, 9, 3, 7, 2, 60, 33], [2, 7, 4, 8, 50, 11, 12, 40]])


def mixtral(transformers):
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_TEXT, **_FOUR))


def qwen3(transformers):
    config = transformers.Qwen3MoeConfig(
        **_TEXT, **_EIGHT, num_experts=8, num_key_value_heads=2, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss(transformers):  # its weights are stored as (G, K, N), with biases
    kinds = ["full_attention"] * 2
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.GptOssConfig(
        **_TEXT, **_FOUR, head_dim=8, layer_types=kinds, rope_parameters=rope
    )
    return transformers.GptOssForCausalLM(config)


def deepseek(transformers):
    config = transformers.DeepseekV3Config(
        **_TEXT,
        **_EIGHT,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def granite(transformers):
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**_TEXT, **_FOUR))


MODELS = {make.__name__: make for make in (mixtral, qwen3, gpt_oss, deepseek, granite)}


def has_bank(module) -> bool:
    """Whether it is a module of experts with stacked weights, not yet adapted or merged."""
    down = module._parameters.get("down_proj")
    return down is not None and down.ndim == 3


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """The model `name` of `MODELS` in eval mode, with weights of a size that lets every expert matter."""
    import transformers

    torch.manual_seed(seed)
    model = MODELS[name](transformers)
    with torch.no_grad():
        for path, parameter in model.named_parameters():  # gpt-oss leaves some uninitialised
            if "norm" not in path:
                parameter.normal_(std=0.2)
    banks = [n for n, p in model.named_parameters() if p.ndim == 3 and n.endswith("down_proj")]
    if not banks:
        pytest.skip(f"transformers {transformers.__version__} has no banks of experts in {name}")
    if dtype == torch.float64:  # which transformers' grouped products do not take
        model.set_experts_implementation("eager")
    return model.to(dtype).eval()
