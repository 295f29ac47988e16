"""transformers' Trainer gives the same losses with PEFT's layers, with accelerated ones and with fastlora's; on a GPU in bfloat16."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora.peft.layer import FastLinear

ON_GPU = torch.cuda.is_available()
LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
# Of transformers and torch under the trainer.
pytestmark = pytest.mark.filterwarnings("ignore")


def base_model():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape))
    return model.requires_grad_(False).to(torch.bfloat16 if ON_GPU else torch.float32)


def build(kind, folder):
    """The model with the adapter in the folder."""
    base = base_model()
    if kind == "fastlora":
        fastlora.from_pretrained(base, folder)
        fastlora.freeze_base_params(base)
        return base
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    if kind == "accelerated":
        assert all(layer.fast for layer in fastlora.accelerate(model).layers)
    return model


def losses_of(kind, checkpointing, folder):
    """The losses of six steps, and that of the trained model after saving and loading."""
    model = build(kind, folder / "initial")
    tokens = torch.arange(16) * torch.tensor([[1], [3], [5], [7], [9], [11]]) % 64
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=6,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        bf16=ON_GPU,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        label_names=["labels"],
        use_cpu=not ON_GPU,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    save = fastlora.save_pretrained if kind == "fastlora" else peft.PeftModel.save_pretrained
    save(model, folder / kind)
    again = build(kind, folder / kind).to(model.device).eval()
    tokens = tokens.to(model.device)
    # The trainer leaves its autocast on the model's forward.
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=ON_GPU):
        reloaded = again(input_ids=tokens, labels=tokens).loss
        trained = model.eval()(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(reloaded, trained)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_losses_are_pefts(checkpointing, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=LAYERS, task_type="CAUSAL_LM")
    peft.get_peft_model(base_model(), config).save_pretrained(tmp_path / "initial")
    expected, _ = losses_of("peft", checkpointing, tmp_path)
    assert len(expected) == 6 and min(expected) < expected[0]
    for kind, layer in (("accelerated", FastLinear), ("fastlora", fastlora.LoRALinear)):
        found, model = losses_of(kind, checkpointing, tmp_path)
        assert sum(isinstance(module, layer) for module in model.modules()) == 2 * len(LAYERS)
        assert found == pytest.approx(expected, rel=0.02 if ON_GPU else 1e-4)
