"""transformers' save_pretrained, Trainer, tie_weights and resize_token_embeddings on models with fastlora's adapters."""

import copy
import gc
import logging
import pickle
import weakref

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import fastlora
from fastlora import ConfigError, FastLoRAWarning, InjectionError, LoRAConfig
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close

TOKENS = torch.arange(16) * torch.tensor([[1], [3], [5], [7], [9], [11]]) % 64
# Of transformers, torch and peft under the trainer; fastlora's own stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::fastlora.FastLoRAWarning"),
]


def base_model(tie=False, seed=0):
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tie, **shape)
    return LlamaForCausalLM(config).eval()


def adapted(targets=("q_proj", "v_proj"), tie=False, seed=0, **options):
    model = base_model(tie, seed)
    kinds = ("linear", "embedding")
    config = LoRAConfig(list(targets), rank=4, match="exact", kinds=kinds, **options)
    fastlora.inject_lora(model, config)
    fastlora.freeze_base_params(model)
    randomise_adapters(model)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def assert_loads_everywhere(folder, model, base):
    """The folder gives AutoModel, PEFT and fastlora the output of `model`."""
    expected = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(
        logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)), expected
    )
    plain = copy.deepcopy(base)
    fastlora.from_pretrained(plain, folder)
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("lm_head", "q_proj"), ("embed_tokens",)]
)
@pytest.mark.parametrize("tie", [False, True])
def test_save_pretrained_of_transformers_writes_what_auto_model_and_peft_load(
    targets, tie, tmp_path
):
    model = adapted(targets, tie)
    before = list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert_loads_everywhere(tmp_path, model, base_model(tie))
    state = load_file(tmp_path / "model.safetensors")
    assert not any("original_" in key for key in state)
    again = adapted(targets, tie, seed=1)
    result = again.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert [key.rpartition(".")[2] for key in result.missing_keys] == ["weight"] * tie  # tied
    assert torch.equal(logits(again), logits(model))
    assert list(model.state_dict()) == before


def test_initialisations_and_heads_are_saved_too(tmp_path):
    base = base_model()
    model = adapted(("q_proj",), init_lora_weights="pissa", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        peft.PeftModel.from_pretrained(base, tmp_path),
    ):
        # The initial product is part of the factors there, which is another order of summation.
        assert_close(logits(loaded), expected, logits(copy.deepcopy(model).double()))


def test_what_pefts_format_cannot_store_warns_and_auto_model_still_loads_it(tmp_path):
    model = adapted()
    model.model.layers[0].self_attn.q_proj.original_linear.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.original_linear.weight.add_(0.1)
    fastlora.get_trainable_params(model)
    with pytest.warns(FastLoRAWarning, match="save_pretrained: model: .*q_proj.original_linear"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(ConfigError, match=r"push_to_hub: .* model\.push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    with pytest.raises(InjectionError, match="save_pretrained: the model was freed .* variable"):
        adapted().save_pretrained(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_an_adapter_that_peft_cannot_store_is_saved_for_load_state_dict(tmp_path):
    def made(seed):
        torch.manual_seed(0)
        shape = {"num_channels": 3, "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
        model = ConvNextForImageClassification(ConvNextConfig(**shape))
        plain = copy.deepcopy(model.eval())
        fastlora.inject_lora(model, fastlora.LoRAConfig(["dwconv"], kinds=["conv"], rank=8))
        fastlora.freeze_base_params(model)
        randomise_adapters(model, seed=seed)
        return plain, model.eval()

    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, model = made(0)
    with pytest.warns(FastLoRAWarning, match="groups.*PEFT loads only the base model"):
        model.save_pretrained(tmp_path)  # a convolution with groups
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(image).logits, plain(image).logits)
    _, again = made(1)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(image).logits, model(image).logits)
    assert not torch.equal(again(image).logits, plain(image).logits)


def test_a_given_state_dict_is_saved_instead_of_the_model_s(tmp_path):
    model, other = adapted(), adapted(seed=3)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_loads_everywhere(tmp_path, other, base_model(seed=3))


def test_copies_and_pickles_save_themselves_and_plain_models_are_as_before(tmp_path):
    model = adapted()
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for n, other in enumerate((copied, loaded)):
        randomise_adapters(other, seed=n)
        other.save_pretrained(tmp_path / str(n))
        assert_loads_everywhere(tmp_path / str(n), other, base_model())
    assert not torch.equal(logits(model), logits(copied))
    merged = fastlora.merged_model(model)
    assert b"fastlora" not in pickle.dumps(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged)
    )
    fastlora.set_adapter(model, None)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    fastlora.delete_adapter(model, "default")
    assert "save_pretrained" not in model.__dict__
    gc.disable()
    try:  # a model with adapters is freed at once, as without
        known = weakref.ref(copied)
        del copied, other
        assert known() is None
    finally:
        gc.enable()


def test_a_transformers_model_inside_another_module(tmp_path):
    outer = torch.nn.ModuleDict({"inner": base_model()})
    fastlora.inject_lora(outer, LoRAConfig(["q_proj"], match="exact"))
    fastlora.freeze_base_params(outer)
    randomise_adapters(outer)
    outer["inner"].save_pretrained(tmp_path)
    assert_loads_everywhere(tmp_path, outer["inner"], base_model())


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tied_weights_stay_tied_under_adapters(targets):
    model = adapted(targets, tie=True)
    expected = logits(model)

    def weight(layer):
        return layer.wrapped.weight if isinstance(layer, fastlora.LoRALayer) else layer.weight

    embeddings = weight(model.get_input_embeddings())
    assert weight(model.get_output_embeddings()) is embeddings
    # As after loading, where a copy of the tensor has taken the place of the tied one.
    head = model.lm_head.wrapped if "lm_head" in targets else model.lm_head
    head.weight = torch.nn.Parameter(torch.zeros_like(embeddings))
    model.tie_weights()
    assert weight(model.get_output_embeddings()) is embeddings
    assert torch.equal(logits(model), expected)


def test_the_size_of_the_vocabulary_changes_unless_an_adapter_belongs_to_it():
    model = adapted(("q_proj",), tie=True)
    expected = logits(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model)[..., :64], expected)
    for targets in (["lm_head"], ["embed_tokens"]):
        model = adapted(targets, tie=True)
        expected = logits(model)
        assert model.resize_token_embeddings(64) is model.model.embed_tokens
        assert model.resize_token_embeddings(pad_to_multiple_of=32) is model.get_input_embeddings()
        for arguments in ({"new_num_tokens": 70}, {"pad_to_multiple_of": 100}):
            with pytest.raises(InjectionError, match=rf"{targets[0]} is adapted for 64 tokens"):
                model.resize_token_embeddings(**arguments)
        assert torch.equal(logits(model), expected)


def trainer_for(model, folder, callbacks=(), **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=3,
        learning_rate=3e-2,
        save_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **{"max_steps": 4, **options},
    )
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
    )


def checkpoint_size(folder):
    return (folder / "model.safetensors").stat().st_size


CALLBACKS = {"whole": lambda: [], "adapters": lambda: [fastlora.FastLoRACallback()]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_resumes_and_saves_what_others_load(kind, checkpointing, tmp_path, caplog):
    options = dict(gradient_checkpointing=checkpointing, save_total_limit=3)
    whole = trainer_for(adapted(dropout=0.1), tmp_path / "a", CALLBACKS[kind](), **options)
    whole.train()
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    for step in (2, 4):
        folder = tmp_path / "a" / f"checkpoint-{step}"
        assert (folder / "config.json").exists() == (kind == "whole")
    plain = base_model()
    fastlora.from_pretrained(plain, tmp_path / "a" / "checkpoint-4")
    assert torch.equal(logits(plain), logits(whole.model))
    with caplog.at_level(logging.WARNING):
        again = trainer_for(
            adapted(dropout=0.1, seed=0), tmp_path / "b", CALLBACKS[kind](), **options
        )
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text
    assert again.state.global_step == 4
    for trainer in (whole, again):
        trainer.save_model(str(tmp_path / "out"))
        assert_loads_everywhere(tmp_path / "out", trainer.model, base_model())
        assert_close(logits(again.model), logits(whole.model), logits(whole.model).double())


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLBACKS)
def test_the_trainer_restores_the_best_model(kind, tmp_path):
    trainer = trainer_for(
        adapted(),
        tmp_path / "run",
        CALLBACKS[kind](),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is not the last one
        save_only_model=True,
        save_total_limit=1,
    )
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == max(scores) and scores[-1] < max(scores)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(scores), rel=1e-6)
    trainer.save_model(str(tmp_path / "out"))
    assert_loads_everywhere(tmp_path / "out", trainer.model, base_model())


def test_checkpoints_with_the_callback_hold_no_base_weights(tmp_path):
    model = adapted(modules_to_save=["norm"])
    trainer = trainer_for(model, tmp_path / "run", CALLBACKS["adapters"](), max_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    state = load_file(folder / "model.safetensors")
    assert state.keys() == fastlora.get_lora_state_dict(model, include_trainable=True).keys()
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "optimizer.pt"}
    fresh = adapted(seed=0, modules_to_save=["norm"])
    randomise_adapters(fresh, seed=9)
    fastlora.load_adapter(fresh, folder / "model.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    model.save_pretrained(tmp_path / "later")  # training is over: the whole model again
    assert_loads_everywhere(tmp_path / "later", model, base_model())


def test_the_callback_with_a_plain_module_and_without_adapters(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Linear(4, 4)

        def forward(self, x, labels):
            y = self.body(x)
            return {"loss": (y - labels).square().mean(), "logits": y}

    model, plain = Plain(), Plain()
    fastlora.inject_lora(model, ["body"])
    fastlora.freeze_base_params(model)
    rows = torch.randn(6, 4)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"x": row, "labels": row} for row in rows]
    callback = fastlora.FastLoRACallback()
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    fastlora.from_pretrained(plain, tmp_path / "checkpoint-2")
    assert torch.equal(plain.body(rows), model.body(rows))
    trainer = trainer_for(base_model(), tmp_path / "none", [fastlora.FastLoRACallback()])
    with pytest.raises(ConfigError, match="FastLoRACallback: model: has no adapters of fastlora"):
        trainer.train()
    several = base_model()
    for name in ("a", "b"):
        fastlora.add_adapter(several, name, ["q_proj"])
    fastlora.set_adapter(several, ["a", "b"])
    trainer = trainer_for(several, tmp_path / "several", [fastlora.FastLoRACallback()])
    with pytest.raises(ConfigError, match="FastLoRACallback: model: has several active adapters"):
        trainer.train()
