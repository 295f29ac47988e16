"""`accelerate` in PEFT models: the same results as PEFT, all its features, and a reason wherever PEFT's forward runs."""

import copy
import pickle

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import FastLoRAError, InjectionError, accelerate, restore
from fastlora.peft import layer as peft_layer
from fastlora.peft.layer import FastLinear
from tests.support.models import Decoder, Reader
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import needs_torch

TARGETS = ["to_qkv", "to_out", "mlp.0", "mlp.2"]


def peft_model(seed=3, dtype=None, base=None, **options):
    """A Decoder with PEFT adapters whose B is not zero; equal seeds give equal weights in any dtype."""
    torch.manual_seed(seed)
    base = base or Decoder()
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    fill(model, seed)
    return model if dtype is None else model.to(dtype)


def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by one at each call of the fused path."""
    calls = []

    def counted(real):
        def call(*args):
            calls.append(args[0].dtype)
            return real(*args)

        return call

    for name in ("lora_linear", "lora_linear_mixed"):
        monkeypatch.setattr(peft_layer, name, counted(getattr(peft_layer, name)))
    return calls


def forwards(fused, model, x):
    """(output, number of fused calls) of one forward."""
    before = len(fused)
    return model(x), len(fused) - before


def train(model, steps=5):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(11)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 8, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {n: p.detach() for n, p in model.named_parameters()}


def test_five_steps_of_training_equal_pefts(fused):
    mine = peft_model()
    report = accelerate(mine)
    assert report.changed == 8 and all(layer.fast for layer in report.layers)
    losses, parameters = train(mine)
    assert len(fused) == 5 * 8
    their_losses, theirs = train(peft_model())
    losses64, exact = train(peft_model(dtype=torch.float64))
    assert_close(losses, their_losses, losses64, "losses")
    assert losses[0] != losses[-1]
    for name, parameter in parameters.items():
        assert_close(parameter, theirs[name], exact[name], name)


def test_the_report_is_readable_and_a_second_call_changes_nothing():
    model = peft_model()
    first = accelerate(model)
    assert str(first).splitlines()[:2] == [
        "8 of 8 LoRA layers use the fused path (8 changed)",
        "  fast  base_model.model.blocks.0.attn.to_qkv: one adapter on a plain nn.Linear",
    ]
    kinds = [type(module) for module in model.modules()]
    second = accelerate(model)
    assert second.changed == 0 and second.layers == first.layers
    assert [type(module) for module in model.modules()] == kinds


def test_layers_whose_weight_a_parent_reads_are_not_called_fast():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = peft_model(base=encoder, target_modules=["out_proj", "linear1", "linear2"])
    x = torch.randn(2, 3, 8)
    for _ in range(2):
        report = accelerate(model)
        assert not any(layer.fast for layer in report.layers)
        out_proj, *linear = (layer.reason for layer in report.layers)
        assert out_proj.startswith(
            "nn.MultiheadAttention reads the weight, in PEFT the base's, and"
        )
        assert all(r.startswith("in eval mode nn.TransformerEncoderLayer reads") for r in linear)
        model.train()(x)
    with torch.no_grad():
        adapters_on = model.eval()(x)
        with model.disable_adapter():
            assert torch.equal(model(x), adapters_on)  # what the reasons say


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "activation": nn.functional.silu}], ids=["first", "silu"]
)
def test_the_layers_of_an_encoder_without_a_fast_path_are_fast(options):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, **options)
    report = accelerate(peft_model(base=encoder, target_modules=["linear1", "linear2"]))
    assert all(layer.fast for layer in report.layers)


def test_a_projection_that_peft_merges_itself_is_not_called_fast():
    model = peft_model(base=nn.Sequential(nn.MultiheadAttention(8, 2)), target_modules=["0"])
    reasons = {layer.path.rpartition(".")[2]: layer.reason for layer in accelerate(model).layers}
    assert reasons["out_proj"] == "PEFT's MultiheadAttention merges it for each call"


def test_a_layer_that_is_never_called_is_named_once_others_were():
    model, x = peft_model(base=Reader(), target_modules=["called", "read"]), torch.randn(2, 8)
    assert all(layer.fast for layer in accelerate(model).layers)
    model(x).sum().backward()
    called, read = accelerate(model).layers
    assert called.fast and not read.fast
    assert read.reason.startswith("its forward has not been called, while that of others has")
    assert model.base_model.model.read.lora_B["default"].weight.grad is None  # PEFT trains nothing
    assert all(layer.fast for layer in accelerate(copy.deepcopy(model)).layers)
    restore(model)
    assert all(layer.fast for layer in accelerate(model).layers)


def test_a_layer_has_pefts_repr():
    model = peft_model()
    before = repr(model)
    accelerate(model)
    assert repr(model) == before


def test_restore_restores_the_exact_classes(fused):
    model = peft_model()
    before = {path: type(module) for path, module in model.named_modules()}
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    assert {type(m) for m in model.modules() if isinstance(m, lora.Linear)} == {FastLinear}
    assert restore(model) == 8 and restore(model) == 0
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert forwards(fused, model, torch.randn(2, 8))[1] == 0


@pytest.mark.parametrize("call", [accelerate, restore])
def test_a_model_without_pefts_layers_is_refused(call):
    with pytest.raises(
        InjectionError,
        match=r"peft_model: expected a model with peft's LoRA layers .* got a Decoder without any",
    ):
        call(Decoder())


def test_without_peft_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft.tuners.lora", None)
    with pytest.raises(FastLoRAError, match="peft_model: needs the package peft"):
        accelerate(Decoder())


def test_a_peft_without_variants_is_too_old():
    model = peft_model()
    for module in model.modules():
        if isinstance(module, lora.Linear):
            del module.lora_variant
    with pytest.raises(
        InjectionError, match=f"needs peft 0.16 or newer, .* got {peft.__version__}"
    ):
        accelerate(model)


def test_adapters_are_switched_disabled_added_and_deleted_as_in_peft(fused):
    mine, theirs = peft_model(), peft_model()
    for model in (mine, theirs):
        torch.manual_seed(5)
        model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_qkv"]))
        fill(model, 6)
    accelerate(mine)
    x = torch.randn(3, 8)
    outputs = {}
    for name, calls in (("default", 8), ("other", 2)):
        mine.set_adapter(name)
        theirs.set_adapter(name)
        outputs[name], n = forwards(fused, mine, x)
        assert n == calls
        torch.testing.assert_close(outputs[name], theirs(x))
    assert not torch.equal(outputs["default"], outputs["other"])
    with mine.disable_adapter(), theirs.disable_adapter():
        y, n = forwards(fused, mine, x)
        assert n == 0 and torch.equal(y, theirs(x))
        assert "the adapters are disabled" in str(accelerate(mine))
    for model in (mine, theirs):
        model.base_model.set_adapter(["default", "other"])
    y, n = forwards(fused, mine, x)
    assert n == 8  # the two to_qkv hold both
    torch.testing.assert_close(y, theirs(x))
    report = str(accelerate(mine))
    assert report.count("the sum of 2 adapters on a plain nn.Linear") == 2
    assert report.count("one adapter on a plain nn.Linear") == 6
    for model in (mine, theirs):
        model.delete_adapter("other")
        model.set_adapter("default")
    assert forwards(fused, mine, x)[1] == 8
    torch.manual_seed(5)
    mine.add_adapter("late", peft.LoraConfig(r=2, target_modules=["out_layer"]))
    assert accelerate(mine).changed == 1  # a layer that PEFT added after the first call


def test_merging_unmerging_and_unloading(fused):
    mine, theirs = peft_model(), peft_model()
    accelerate(mine)
    x = torch.randn(3, 8)
    mine.merge_adapter()
    theirs.merge_adapter()
    y, n = forwards(fused, mine, x)
    assert n == 0 and torch.equal(y, theirs(x))
    assert "default is merged into the base weight" in str(accelerate(mine))
    mine.unmerge_adapter()
    theirs.unmerge_adapter()
    y, n = forwards(fused, mine, x)
    assert n == 8
    torch.testing.assert_close(y, theirs(x))
    plain = mine.merge_and_unload()
    assert torch.equal(plain(x), theirs.merge_and_unload()(x))
    assert not any(isinstance(module, lora.LoraLayer) for module in plain.modules())


def test_save_and_load_are_pefts(tmp_path, fused):
    mine = peft_model()
    accelerate(mine)
    mine.save_pretrained(tmp_path / "mine")
    peft_model().save_pretrained(tmp_path / "theirs")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "mine" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    torch.manual_seed(3)
    loaded = peft.PeftModel.from_pretrained(Decoder(), tmp_path / "mine")
    assert accelerate(loaded).changed == 8
    x = torch.randn(3, 8)
    y, n = forwards(fused, loaded, x)
    assert n == 8 and torch.equal(y, mine(x))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_fast_and_independent(duplicate, fused):
    model = peft_model()
    accelerate(model)
    twin = duplicate(model)
    x = torch.randn(3, 8)
    y, n = forwards(fused, twin, x)
    assert n == 8 and torch.equal(y, model(x))
    fill(twin, 9)
    assert not torch.equal(twin(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
@needs_torch((2, 7), "PEFT's own forward does not compile as one graph")
def test_it_compiles_as_one_graph():
    torch.compiler.reset()
    model = peft_model(lora_dropout=0.25)
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    results = []
    for call in (model, compiled):
        torch.manual_seed(8)
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    with model.disable_adapter():  # later changes of state are seen by the compiled model
        plain = compiled(x)
        assert torch.equal(plain, model(x)) and not torch.equal(plain, compiled(x + 1))
    torch.testing.assert_close(compiled(x), model(x))
    model.merge_adapter()
    torch.testing.assert_close(compiled(x), model(x))
    assert_differs(compiled(x), plain)


def test_gradient_checkpointing_draws_the_same_mask_again(fused):
    model = peft_model(lora_dropout=0.5)
    accelerate(model)
    x = torch.randn(4, 8)
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(8)
        model.zero_grad()
        call(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(fused) == 3 * 8  # the checkpointed forward runs twice
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_dropout_follows_the_dropout_module_and_the_generator(fused):
    model = peft_model(lora_dropout=0.5)
    accelerate(model)
    x = torch.randn(4, 8)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first) and not torch.equal(first, second)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # PEFT uses the dropout module's training flag
    y = model(x)
    torch.testing.assert_close(y, peft_model().eval()(x))
    assert torch.equal(model.eval()(x), y) and len(fused) == 5 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_outputs_and_gradients_are_pefts(dtype, fused):
    """A 16-bit base with float32 adapters, PEFT's default."""
    results = []
    for change in (accelerate, lambda model: None):
        model = peft_model(base=Decoder().to(dtype))
        change(model)
        x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
        y = model(x)
        y.float().sum().backward()
        grads = {n: p.grad.dtype for n, p in model.named_parameters() if p.requires_grad}
        results.append((y.dtype, x.grad.dtype, grads))
    assert results[0] == results[1]
    assert results[0][0] == dtype and set(results[0][2].values()) == {torch.float32}
    assert fused == 8 * [dtype]


def test_autocast_gives_pefts_dtypes_and_values(fused):
    results = []
    for change in (accelerate, lambda model: None):
        model = peft_model()
        change(model)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().sum().backward()
        results.append((y, [p.grad for p in model.parameters() if p.requires_grad]))
    exact = peft_model(dtype=torch.float64)(x.double())
    (mine, my_grads), (theirs, their_grads) = results
    assert len(fused) == 8
    assert_close(mine.detach(), theirs.detach(), exact.detach())
    assert [g.dtype for g in my_grads] == [g.dtype for g in their_grads]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantised_like():
    """A weight that is a tensor subclass, as torchao's are."""

    class Packed(torch.Tensor):
        pass

    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed), requires_grad=False)
    return linear


def hooked():
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


@pytest.mark.parametrize(
    ("base", "options", "reason"),
    [
        (nn.Linear(4, 4), {"use_dora": True}, "DoraLinearVariant is not plain LoRA"),
        (nn.Linear(4, 4), {"lora_bias": True}, "lora_bias=True"),
        (Doubled(4, 4), {}, "the base layer is a Doubled with a custom forward"),
        (quantised_like(), {}, "the base layer holds a torch.float32 Packed"),
        (hooked(), {}, "the base layer has hooks"),
        (nn.Embedding(4, 4), {}, "is a lora.Embedding; only lora.Linear itself is supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_uses_pefts_forward_and_why(base, options, reason, fused):
    root = nn.Sequential()
    root.add_module("layer", base)
    model = peft_model(base=root, target_modules=["layer"], **options)
    (entry,) = accelerate(model).layers
    assert (entry.fast, entry.reason) == (False, reason)
    assert str(entry) == f"PEFT  base_model.model.layer: {reason}"
    x = torch.arange(4) if isinstance(base, nn.Embedding) else torch.randn(3, 4)
    y = model(x)
    restore(model)
    assert torch.equal(y, model(x)) and fused == []


def change_adapter(kind):
    def change(layer):
        if kind == "hook":
            layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)
        elif kind == "kind":
            layer.lora_dropout["default"] = nn.AlphaDropout(0.5).eval()
        elif kind == "instance":
            layer.forward = layer.forward
        elif kind == "dropout hook":
            layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: output)
        else:
            layer.lora_dropout["default"] = nn.Dropout(1.0)

    return change


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("hook", "lora_A has hooks"),
        ("kind", "the dropout is a AlphaDropout"),
        ("dropout hook", "the dropout has hooks"),
        ("p", "the dropout's p is 1.0"),
        ("instance", "its forward was replaced on the instance"),
    ],
)
def test_changes_to_the_parts_of_a_layer_are_detected(kind, reason, fused):
    mine = peft_model(base=nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    theirs = copy.deepcopy(mine)
    for model in (mine, theirs):
        change_adapter(kind)(model.base_model.model[0])
    assert reason in accelerate(mine).layers[0].reason
    x = torch.randn(3, 4)
    assert torch.equal(mine(x), theirs(x)) and fused == []


def test_inputs_that_do_not_fit_use_pefts_forward(fused):
    mine = peft_model(base=nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    theirs = copy.deepcopy(mine)
    accelerate(mine)
    for x in (torch.randn(2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.int64)):
        messages = []
        for model in (mine, theirs):
            with pytest.raises(RuntimeError) as raised:
                model(x)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    sparse = torch.eye(4).to_sparse()
    assert torch.equal(mine(sparse), theirs(sparse)) and fused == []
