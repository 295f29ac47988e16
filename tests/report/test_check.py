"""`check`: adapters without effect are found with the reason, working ones pass, and the model does not change."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastlora import (
    CheckError,
    InjectionError,
    LoRAConfig,
    LoRALinear,
    check,
    freeze_base_params,
    inject_lora,
)
from tests.support.models import Decoder, randomise_adapters

X = torch.linspace(-1, 1, 24).view(3, 8)


class Two(nn.Module):
    """Two layers, the second used by the function `use`."""

    def __init__(self, use=None):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.use = use

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if self.use is None else self.use(self, x)


def adapted(model, *targets, **options):
    inject_lora(model, LoRAConfig(list(targets) or "all-linear", **options))
    freeze_base_params(model)
    return model


def fast_path(model, x):
    """What a module that reads weights does in eval mode, when nothing needs a gradient."""
    if model.training or torch.is_grad_enabled():
        return model.second(x)
    return F.linear(x, model.second.original_linear.weight, model.second.bias)


def without_gradients(model, x):
    with torch.no_grad():
        update = model.second(x)
    return x + update


CASES = {
    "weight read": (
        lambda m, x: F.linear(x, m.second.original_linear.weight),
        "does not change the output and gets no gradient: its forward is not called on this sample",
    ),
    "not reached": (lambda m, x: x, "its forward is not called on this sample"),
    "not used": (lambda m, x: (m.second(x), x)[1], "its result is detached, replaced or not used"),
    "detached": (
        lambda m, x: x + m.second(x).detach(),
        "gets no gradient: its forward runs, but its result is detached",
    ),
    "no_grad": (
        without_gradients,
        r"gets no gradient: its forward runs with gradients switched off, by torch.no_grad\(\)",
    ),
    "fast path": (
        fast_path,
        "gets a gradient, but does not change the output in eval mode without gradients",
    ),
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_a_dead_adapter_is_found_with_the_reason(case, training, trained):
    use, reason = CASES[case]
    model = adapted(Two(use)).train(training)
    if trained:
        randomise_adapters(model)
    report = check(model, X)
    assert report.layers == ("first", "second") and not report.ok
    with pytest.raises(CheckError, match=f"1 of 2 adapters .*\n  second: .*{reason}"):
        report.raise_if_failed()
    (finding,) = report.findings
    assert finding.path == "second"


@pytest.mark.parametrize("method", ["orthogonal", "tiny"])
def test_a_tiny_update_hides_nothing(method):
    options = {"init_lora_weights": "orthogonal"} if method == "orthogonal" else {}
    model = adapted(Two(fast_path), **options)
    if method == "tiny":
        nn.init.constant_(model.second.lora_B, 1e-20)
    assert [finding.path for finding in check(model, X).findings] == ["second"]


@pytest.mark.parametrize("change", ["disabled", "frozen", "zero", "alpha", "half frozen", "zero A"])
def test_an_adapter_that_cannot_learn_is_found(change):
    model = adapted(Two())
    layer = model.second
    if change == "alpha":
        layer.alpha = 0.0
    if change == "frozen":
        layer.requires_grad_(False)
    if change == "disabled":
        layer.disabled = True
    if change == "half frozen":
        layer.lora_A.requires_grad_(False)
    if change in ("zero", "zero A"):
        nn.init.zeros_(layer.lora_A)
    if change == "zero A":
        nn.init.ones_(layer.lora_B)
    report = check(model, X)
    words = {"frozen": "requires_grad is False", "zero": "both zero", "alpha": "alpha is 0"}
    words["disabled"] = "is disabled by disable_adapter"
    assert report.ok == (change not in words)
    if change in words:
        assert str(report).count("second: ") == 1 and words[change] in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"init_lora_weights": "orthogonal"}])
def test_a_working_model_passes(options, dtype):
    model = adapted(Decoder().to(dtype), "to_qkv", "mlp", **options)
    report = check(model, X.to(dtype))
    assert report.ok and len(report.layers) == 6
    report.raise_if_failed()
    assert str(report) == "all 6 adapters change the output and get a gradient"


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointing_behind_a_frozen_embedding(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body = nn.Embedding(10, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.head = nn.Linear(8, 3)
            self.open = False

        def forward(self, tokens):
            x = self.table(tokens)
            if self.open:
                x = x.requires_grad_(True)  # as a hook of enable_input_require_grads does
            if not self.training:
                return self.head(self.body(x))
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    model = adapted(Model())
    tokens = torch.arange(10)
    for training in (False, True):
        report = check(model.train(training), tokens)
        assert report.ok != reentrant
    if reentrant:
        assert [f.path for f in report.findings] == ["body.0"]
        assert "reentrant checkpointing" in report.findings[0].reason
    model.open = True
    assert check(model, tokens).ok


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_every_path_of_multihead_attention_and_the_encoder_uses_the_adapters():
    for batch_first in (True, False):
        attention = adapted(nn.MultiheadAttention(16, 4, batch_first=batch_first))
        x = torch.randn(3, 5, 16)
        assert check(attention, x, x, x).ok
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
        nested = batch_first
        encoder = adapted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))
        for training in (True, False):
            assert check(encoder.train(training), x).ok
        if batch_first:
            padding = torch.zeros(3, 5, dtype=torch.bool)
            padding[0, 3:] = True
            assert check(encoder, x, src_key_padding_mask=padding).ok


def read(model, x):
    return F.linear(x, model.second.weight)


def read_for_something_else(model, x):
    return x + 0 * model.second.weight.sum()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_that_works_without_being_called_is_noted(training, dropout):
    model = adapted(Two(read), dropout=dropout).train(training)
    for _ in range(2):
        report = check(model, X)
        assert report.ok and [note.path for note in report.notes] == ["second"]
        report.raise_if_failed()
        assert str(report).startswith(
            "all 2 adapters change the output and get a gradient\n  second: works, but its forward is not called"
        )
    assert not model.second.usage.read  # the check leaves nothing
    assert check(adapted(Two()), X).notes == ()


def test_a_weight_that_is_read_in_vain_is_told_from_one_that_is_not_used():
    (finding,) = check(adapted(Two(read_for_something_else)), X).findings
    assert finding.path == "second"
    assert finding.reason.endswith(
        "is not called on this sample; its weight is read, but not for the output"
    )


def test_a_bypassed_encoder_layer_is_found_by_name():
    class Bypassing(LoRALinear):
        @property
        def weight(self):
            return self.original_linear.weight

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = adapted(nn.TransformerEncoder(layer, 2), "linear1")
    encoder.layers[1].linear1.__class__ = Bypassing
    (finding,) = check(encoder, torch.randn(3, 5, 16)).findings
    assert finding.path == "layers.1.linear1" and "a fast path reads" in finding.reason


class Stateful(nn.Module):
    """Everything that a run could leave behind: statistics, a replaced buffer, three random states, a trainable head."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x, noise):
        self.steps = self.steps + random.random() + np.random.rand()
        x.add_(noise)
        noise.zero_()
        return {"y": self.head(self.lstm(self.norm(self.body(x))[None])[0][0])}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_its_gradients_modes_buffers_and_random_states_are_untouched(training, fails):
    model = Stateful()
    inject_lora(model, ["body"], dropout=0.5)
    freeze_base_params(model)
    model.head.requires_grad_(True)
    model.lstm.requires_grad_(True)
    model.train(training)
    model.norm.training = not training
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.register_hook(lambda _: pytest.fail("a hook ran")) if (
            parameter.requires_grad and parameter.ndim == 2 and parameter.shape[0] == 2
        ) else None
    model.body.lora_A.grad = torch.full_like(model.body.lora_A, 3.0)
    model.lstm.weight_ih_l0.grad = torch.full_like(model.lstm.weight_ih_l0, 4.0)
    before = copy.deepcopy(model.state_dict())
    versions = {name: (p, p._version) for name, p in parameters.items()}
    buffers = dict(model.named_buffers())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    x = X.clone().requires_grad_()
    noise = torch.ones(3, 8) if not fails else torch.ones(5)
    if fails:
        with pytest.raises(RuntimeError):
            check(model, x * 1, noise)
    else:
        assert check(model, x * 1, noise=noise).ok
    assert {name: (p, p._version) for name, p in model.named_parameters()} == versions
    assert {n: id(b) for n, b in model.named_buffers()} == {n: id(b) for n, b in buffers.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert set(grads) == {"body.lora_A", "lstm.weight_ih_l0"}
    assert (grads["body.lora_A"] == 3).all() and (grads["lstm.weight_ih_l0"] == 4).all()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert x.grad is None and torch.equal(x, X) and (noise == 1).all()


def test_the_text_has_one_line_for_each_reason():
    model = adapted(Decoder(blocks=3), "to_qkv", "mlp")
    for block in model.blocks:
        block.mlp.mlp.requires_grad_(False)
    model.blocks[0].attn.to_qkv.alpha = 0.0
    text = str(check(model, X)).splitlines()
    assert text[0] == "7 of 9 adapters do not work"
    assert text[1] == "  blocks.0.attn.to_qkv: alpha is 0, so the update is zero"
    paths = [f"blocks.{i}.mlp.mlp.{j}" for i in (0, 1) for j in (0, 2)]
    assert text[2].startswith(f"  {', '.join(paths)} and 2 more: lora_A and lora_B are frozen")
    assert len(text) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_a_compiled_model_is_checked_as_it_runs():
    torch.compiler.reset()
    model = adapted(Two())
    assert check(torch.compile(model, backend="eager"), X).ok
    torch.compiler.reset()
    dead = adapted(Two(lambda m, x: x + m.second(x).detach()))
    assert not check(torch.compile(dead, backend="eager"), X).ok


def test_a_part_in_eval_mode_stays_so_while_the_model_trains():
    model = adapted(Stateful(), "body")
    model.train().norm.eval()
    assert check(model, X[:1], torch.ones(1, 8)).ok
    model.norm.train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        check(model, X[:1], torch.ones(1, 8))
    assert model.norm.training


def test_noise_in_eval_mode_does_not_hide_or_invent_anything():
    model = adapted(Two(lambda m, x: m.second(x) + torch.randn(3, 8)))
    assert check(model, X).ok
    model = adapted(Two(lambda m, x: x + torch.randn(3, 8)))
    assert [finding.path for finding in check(model, X).findings] == ["second"]
    own = torch.Generator()  # not restored by `check`, like the order of atomic additions
    model = adapted(Two(lambda m, x: fast_path(m, x) + 1e-6 * torch.rand(3, 8, generator=own)))
    assert [finding.path for finding in check(model, X).findings] == ["second"]


def test_other_contexts_shared_layers_and_kinds_of_output():
    model = adapted(Two())
    model.alias = model.first
    with torch.no_grad():
        assert check(model, X).layers == ("first", "second")
    with torch.inference_mode():
        assert check(model, X).ok
    model.use = lambda m, x: (m.second(x), -m.second(x))
    assert check(model, X).ok
    model.use = lambda m, x: [{"ids": x.long()}, (torch.softmax(m.second(x), -1),)]
    assert check(model, X).ok
    assert check(LoRALinear(nn.Linear(8, 4)), X).ok


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check(Decoder(), X), InjectionError, "model: has no adapters"),
        (
            lambda: check(nn.DataParallel(adapted(Two())), X),
            InjectionError,
            "model: is a DataParallel; pass model.module",
        ),
        (
            lambda: check(adapted(Two(lambda m, x: x.argmax())), X),
            CheckError,
            "expected an output with floating-point tensors, got Tensor",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
