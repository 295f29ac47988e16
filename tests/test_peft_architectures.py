"""Adapters go between PEFT and fastlora on small, randomly initialised models of real architectures."""

import json

import peft
import pytest
import torch

from fastlora import (
    LoRAConfig,
    accelerate,
    freeze_base_params,
    from_pretrained,
    inject_lora,
    named_lora_layers,
    save_pretrained,
)
from tests.models import randomise_adapters
from tests.tolerance import assert_differs

transformers = pytest.importorskip("transformers")

# PEFT reads a property that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:fan_in_fan_out is set to False"
    ),  # PEFT, which sets it right
]

IDS = torch.tensor([[1, 5, 9, 3], [2, 7, 4, 8]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
VISION = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")} | {
    "image_size": 8,
    "patch_size": 4,
}


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS}


def gpt2():  # its linear layers are transformers' Conv1D
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS}


def bert():
    config = transformers.BertConfig(**TEXT, num_labels=3)
    return transformers.BertForSequenceClassification(config), {"input_ids": IDS}


def vit():
    config = transformers.ViTConfig(**VISION, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": PIXELS}


def clip():
    config = transformers.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 8}, vision_config=VISION, projection_dim=8
    )
    return transformers.CLIPModel(config), {"input_ids": IDS, "pixel_values": PIXELS}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=32,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    features = torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20)
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": features, "decoder_input_ids": IDS}


MODELS = [
    (llama, ["q_proj", "v_proj", "down_proj"], None),
    (llama, "all-linear", None),
    (gpt2, ["c_attn", "c_fc"], None),
    (bert, ["query", "value"], ["classifier"]),
    (vit, None, ["classifier"]),
    (clip, ["q_proj", "v_proj", "fc1"], None),
    (whisper, ["q_proj", "v_proj"], None),
]


def build(make):
    torch.manual_seed(7)
    model, inputs = make()
    return model.eval(), inputs


def targets_of(model, targets):
    """The names of a ViT's projections changed between versions of transformers."""
    if targets is not None:
        return targets
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return [name for name in ("query", "q_proj", "value", "v_proj") if name in names]


def logits(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.logits_per_image


@pytest.mark.parametrize(("make", "targets", "heads"), MODELS)
def test_from_peft(make, targets, heads, tmp_path):
    base, inputs = build(make)
    before = logits(base, inputs)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=targets_of(base, targets), modules_to_save=heads
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    mine, _ = build(make)
    from_pretrained(mine, tmp_path)
    expected = logits(theirs, inputs)
    torch.testing.assert_close(logits(mine, inputs), expected)
    assert_differs(expected, before)
    accelerate(theirs)
    torch.testing.assert_close(logits(theirs, inputs), expected)


@pytest.mark.parametrize(("make", "targets", "heads"), MODELS)
def test_to_peft(make, targets, heads, tmp_path):
    mine, inputs = build(make)
    found = targets_of(mine, targets)
    match = "contains" if targets == "all-linear" else "exact"
    inject_lora(mine, LoRAConfig(found, rank=3, alpha=12.0, match=match))
    freeze_base_params(mine)
    for head in heads or ():
        mine.get_submodule(head).requires_grad_(True)
    randomise_adapters(mine)
    save_pretrained(mine, tmp_path)
    base, _ = build(make)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(theirs, inputs), logits(mine, inputs))
    assert_differs(logits(mine, inputs), logits(build(make)[0], inputs))


def test_all_linear_written_by_hand_leaves_the_output_head_out(tmp_path):
    theirs = peft.get_peft_model(build(llama)[0], peft.LoraConfig(r=2, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "all-linear"}))
    mine, inputs = build(llama)
    from_pretrained(mine, tmp_path)
    assert len(list(named_lora_layers(mine))) == 2 * 7
    torch.testing.assert_close(logits(mine, inputs), logits(theirs.eval(), inputs))
