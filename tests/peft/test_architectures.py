"""Adapters are exchanged between PEFT and fastlora on small, randomly initialised models of real architectures."""

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
from fastlora.peft import layer as peft_layer
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import installed

transformers = pytest.importorskip("transformers")

# PEFT reads a property that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT corrects it
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


def qwen():
    config = transformers.Qwen3Config(**TEXT, num_key_value_heads=1, head_dim=8)
    return transformers.Qwen3ForCausalLM(config), {"input_ids": IDS}


def dinov2():
    model = transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**VISION, num_labels=3)
    )
    return model, {"pixel_values": PIXELS}


def sam():
    prompt = {"hidden_size": 16, "image_size": 16, "patch_size": 4, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "mlp_dim": 32}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "window_size": 2}
    config = transformers.SamConfig(
        vision_config=vision | {"global_attn_indexes": [1], "num_pos_feats": 8},
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
        initializer_range=0.3,  # at 0.02 the predicted masks are almost zero
    )
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    points = torch.tensor([[[[4.0, 5.0]]]])
    return transformers.SamModel(config), {"pixel_values": pixels, "input_points": points}


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    noise = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
    prompt = torch.linspace(-1, 1, 2 * 3 * 8).view(2, 3, 8)
    return model, {"sample": noise, "timestep": 5, "encoder_hidden_states": prompt}


def dit():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    noise = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
    steps, labels = torch.tensor([3, 5]), torch.tensor([1, 2])
    return model, {"hidden_states": noise, "timestep": steps, "class_labels": labels}


def timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    return model, {"x": PIXELS}


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


def gemma():
    config = transformers.Gemma3TextConfig(**TEXT, num_key_value_heads=1, head_dim=8)
    return transformers.Gemma3ForCausalLM(config), {"input_ids": IDS}


def phi():  # one layer computes q, k and v
    config = transformers.Phi3Config(**TEXT, num_key_value_heads=1, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config), {"input_ids": IDS}


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)), {"input_ids": IDS}


def t5():
    sizes = {"vocab_size": 32, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, d_kv=8, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": IDS, "decoder_input_ids": IDS}


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=32, dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config), {"input_ids": IDS}


def modernbert():
    config = transformers.ModernBertConfig(**TEXT, num_labels=3, pad_token_id=0)
    return transformers.ModernBertForSequenceClassification(config), {"input_ids": IDS}


MODELS = [
    (llama, ["q_proj", "v_proj", "down_proj"], None),
    (llama, "all-linear", None),
    (gpt2, ["c_attn", "c_fc"], None),
    (bert, ["query", "value"], ["classifier"]),
    (vit, None, ["classifier"]),
    (clip, ["q_proj", "v_proj", "fc1"], None),
    (whisper, ["q_proj", "v_proj"], None),
    (qwen, ["q_proj", "v_proj", "gate_proj"], None),
    (dinov2, None, ["classifier"]),
    (sam, ["qkv", "lin1", "q_proj", "v_proj"], None),
    (unet, ["to_q", "to_v", "to_out.0"], None),
    (dit, ["to_q", "to_v"], None),
    (timm_vit, ["qkv", "proj"], ["head"]),
]


MORE = [
    (gemma, ["q_proj", "v_proj", "down_proj"], None),
    (phi, ["qkv_proj", "gate_up_proj"], None),
    (gpt_neox, ["query_key_value", "dense"], None),
    (t5, ["q", "v", "wi"], None),
    (distilbert, ["q_lin", "v_lin"], ["classifier"]),
    (modernbert, ["Wqkv", "Wo"], ["classifier"]),
]
LANGUAGE = (llama, gpt2, qwen, gemma, phi, gpt_neox)
CLASSES = dict.fromkeys(LANGUAGE, ("CausalLM", "CAUSAL_LM"))
CLASSES |= dict.fromkeys((bert, distilbert, modernbert), ("SequenceClassification", "SEQ_CLS"))
# PEFT 0.21's class for SEQ_2_SEQ_LM calls a method that transformers has removed.
CLASSES |= {t5: ("Seq2SeqLM", None), whisper: ("SpeechSeq2Seq", None)}
CLASSES |= dict.fromkeys((vit, dinov2), ("ImageClassification", None)) | {clip: ("", None)}


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


def answer(model, inputs):
    """The main output of the model, with its graph."""
    output = model(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    names = ("logits", "logits_per_image", "pred_masks", "sample")
    return next(getattr(output, name) for name in names if hasattr(output, name))


def logits(model, inputs):
    with torch.no_grad():
        return answer(model, inputs)


def train(model, inputs):
    """The losses of three steps on all that trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (answer(model, inputs) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


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


@pytest.mark.parametrize(("make", "targets", "heads"), MODELS)
def test_accelerate_equals_peft_step_for_step(make, targets, heads, monkeypatch):
    def peft_model(dtype):
        base, inputs = build(make)
        targeted = targets_of(base, targets)
        config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=targeted, modules_to_save=heads)
        model = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        floats = {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        return model.to(dtype), floats

    mine, inputs = peft_model(torch.float32)
    assert all(layer.fast for layer in accelerate(mine).layers)
    calls = []
    fused = peft_layer.lora_linear
    monkeypatch.setattr(peft_layer, "lora_linear", lambda *a: calls.append(1) or fused(*a))
    losses = train(mine, inputs)
    assert len(calls) >= 3
    their_model, inputs = peft_model(torch.float32)
    their_losses = train(their_model, inputs)
    exact, inputs = peft_model(torch.float64)
    assert_close(losses, their_losses, train(exact, inputs), "losses")
    assert losses[0] != losses[-1]
    theirs, wide = dict(their_model.named_parameters()), dict(exact.named_parameters())
    for name, parameter in mine.named_parameters():
        assert_close(parameter.detach(), theirs[name].detach(), wide[name].detach(), name)


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
    start = logits(mine, inputs)
    train(mine, inputs)
    assert not torch.equal(logits(mine, inputs), start)
    save_pretrained(mine, tmp_path)
    base, _ = build(make)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(theirs, inputs), logits(mine, inputs))
    assert_differs(logits(mine, inputs), logits(build(make)[0], inputs))


def test_all_linear_written_by_hand_excludes_the_output_head(tmp_path):
    theirs = peft.get_peft_model(build(llama)[0], peft.LoraConfig(r=2, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": "all-linear"}))
    mine, inputs = build(llama)
    from_pretrained(mine, tmp_path)
    assert len(list(named_lora_layers(mine))) == 2 * 7
    torch.testing.assert_close(logits(mine, inputs), logits(theirs.eval(), inputs))


def saved_base(make, folder):
    """The base model, loaded from a folder that it was saved in if its library can do that."""
    model, inputs = build(make)
    if not hasattr(type(model), "from_pretrained"):
        return model, inputs
    if not folder.exists():  # its weights may be mapped into a model that was loaded from it
        model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval(), inputs


def exactly(model, inputs, expected):
    found = logits(model.eval(), inputs)
    difference = (found - expected).abs().max().item()
    assert difference == 0.0, f"{type(model).__name__}: {difference}"


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")  # diffusers' call
@pytest.mark.parametrize(("make", "targets", "heads"), MODELS + MORE)
def test_a_saved_folder_is_the_same_to_every_loader(make, targets, heads, tmp_path):
    mine, inputs = saved_base(make, tmp_path / "base")
    found = targets_of(mine, targets)
    inject_lora(mine, peft.LoraConfig(r=3, target_modules=found, modules_to_save=heads))
    freeze_base_params(mine)
    randomise_adapters(mine)
    for head in heads or ():
        with torch.no_grad():
            mine.get_submodule(head).weight.mul_(1.5)
    save_pretrained(mine, tmp_path / "ours")
    theirs = saved_base(make, tmp_path / "base")[0]
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    expected = logits(theirs, inputs)
    torch.testing.assert_close(logits(mine, inputs), expected)  # two orders of rounding
    assert_differs(expected, logits(saved_base(make, tmp_path / "base")[0], inputs))
    if (tmp_path / "base").exists():
        exactly(peft.AutoPeftModel.from_pretrained(tmp_path / "ours"), inputs, expected)
    # Before 5.13 transformers loads the adapters of a folder without its heads.
    if make in CLASSES and (not heads or installed("transformers") >= (5, 13)):
        name, task = CLASSES[make]
        auto = getattr(transformers, f"AutoModelFor{name}" if name else "AutoModel")
        exactly(auto.from_pretrained(tmp_path / "ours"), inputs, expected)
        if task is not None:
            save_pretrained(mine, tmp_path / "task", task_type=task)
            loader = getattr(peft, f"AutoPeftModelFor{name}")
            exactly(loader.from_pretrained(tmp_path / "task"), inputs, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back, _ = saved_base(make, tmp_path / "base")
        from_pretrained(back, tmp_path / folder)
        exactly(back, inputs, logits(mine, inputs))
