"""`adapter_names` and several active adapters in an accelerated PEFT model: PEFT's results, by the fused path."""

import copy

import peft
import pytest
import torch
from peft.tuners import lora

from fastlora import accelerate
from fastlora.peft import layer as peft_layer
from tests.support.models import Decoder
from tests.support.tolerance import assert_close, assert_differs

NAMES = ["one", "__base__", "two", "one", "one", "two"]
CONFIGS = {
    "one": {"r": 3, "lora_alpha": 5, "target_modules": ["to_qkv", "to_out"]},
    "two": {"r": 4, "lora_alpha": 3, "target_modules": ["to_out", "mlp.0"], "use_rslora": True},
}


def peft_model(dtype=torch.float32, **options):
    torch.manual_seed(3)
    configs = {name: peft.LoraConfig(**config | options) for name, config in CONFIGS.items()}
    model = peft.get_peft_model(Decoder(), configs["one"], adapter_name="one")
    model.add_adapter("two", configs["two"])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.fixture
def mixed(monkeypatch):
    """The segments of each call of the fused path with several adapters."""
    calls = []
    real = peft_layer.lora_linear_mixed

    def counted(x, weight, bias, lows, segments):
        calls.append(segments)
        return real(x, weight, bias, lows, segments)

    monkeypatch.setattr(peft_layer, "lora_linear_mixed", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])
def test_adapter_names_give_each_sample_its_adapter(mixed, shape, dtype):
    mine, x = peft_model(dtype), x_of(*shape, dtype=dtype)
    theirs, exact = copy.deepcopy(mine), copy.deepcopy(mine).double()
    accelerate(mine)
    with torch.no_grad():
        got = mine(x, adapter_names=NAMES)
        want = exact(x.double(), adapter_names=NAMES)
        assert_close(got, theirs(x, adapter_names=NAMES), want)
        assert len(mixed) == 6  # two of the four kinds of layers have one adapter
        assert_differs(want, exact(x.double(), adapter_names=["one"] * 6))
        assert_close(mine(x), theirs(x), exact(x.double()))  # the active adapter again


def test_gradients_of_a_mixed_batch_are_pefts(mixed):
    mine, x = peft_model(torch.float64), x_of(6, 5, 8, dtype=torch.float64)
    theirs = copy.deepcopy(mine)
    accelerate(mine)
    for model in (mine, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        inputs = x.clone().requires_grad_()
        model(inputs, adapter_names=NAMES).square().sum().backward()
        model.dx = inputs.grad
    assert mixed
    assert_close(mine.dx, theirs.dx, theirs.dx)
    for (name, got), want in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        if "lora_" in name:
            assert_close(got.grad, want.grad, want.grad, name)


def test_several_active_adapters_are_summed_and_train(mixed):
    mine, x = peft_model(torch.float64), x_of(3, 8, dtype=torch.float64)
    theirs = copy.deepcopy(mine)
    accelerate(mine)
    for model in (mine, theirs):
        model.base_model.set_adapter(["one", "two"])
        model(x).square().sum().backward()
    assert len(mixed) == 2  # both to_out
    found = dict(theirs.named_parameters())
    gradients = [(n, p.grad, found[n].grad) for n, p in mine.named_parameters() if "lora_" in n]
    for name, got, want in gradients:
        assert_close(got, want, want, name)
    assert "the sum of 2 adapters on a plain nn.Linear" in str(accelerate(mine))


def test_what_peft_refuses_is_refused(mixed):
    mine, x = peft_model(), x_of(6, 8)
    accelerate(mine)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        mine(x, adapter_names=NAMES[:-1])
    with pytest.raises(ValueError, match="training mode"):
        mine.train()(x, adapter_names=NAMES)
    mine.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        mine(x, adapter_names=NAMES)
    assert mixed == []


def test_disabled_and_dora_adapters_are_pefts(mixed):
    mine, x = peft_model(), x_of(6, 8)
    accelerate(mine)
    with mine.disable_adapter():
        assert torch.equal(mine(x, adapter_names=NAMES), mine(x))
    dora = peft_model(use_dora=True)
    theirs = copy.deepcopy(dora)
    accelerate(dora)
    with pytest.raises(ValueError, match="DoRA"):  # after which PEFT leaves its hooks behind
        copy.deepcopy(dora)(x, adapter_names=NAMES)
    for model in (dora, theirs):
        model.base_model.set_adapter(["one", "two"])
    assert torch.equal(dora(x), theirs(x)) and mixed == []


def test_dropout_of_a_summed_adapter_is_its_own(mixed):
    """In training mode each adapter draws a mask of its own, as in PEFT."""
    model = peft_model(lora_dropout=0.5).train()
    accelerate(model)
    model.base_model.set_adapter(["one", "two"])
    layer = next(m for m in model.modules() if isinstance(m, lora.Linear) and len(m.lora_A) == 2)
    x = torch.ones(200, layer.in_features)
    drawn = []
    real = layer._path
    layer._path = lambda *given: drawn.append(real(*given)) or drawn[-1]
    layer(x)
    assert [p for *_, p, _ in drawn] == [0.5, 0.5]
    assert drawn[0][-1] != drawn[1][-1]
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
