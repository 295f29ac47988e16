"""Layers that accelerate offloads: every value is that of the same model in memory."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fastlora
from fastlora import (
    CheckpointError,
    FastLoRAWarning,
    InjectionError,
    LoRAConfig,
    MergeError,
    add_adapter,
    base_state_dict,
    check,
    disable_adapter,
    freeze_base_params,
    from_pretrained,
    get_lora_params,
    get_lora_state_dict,
    inject_lora,
    load_adapter,
    load_base_state_dict,
    load_lora_state_dict,
    merge_lora_weights,
    save_adapter,
    save_pretrained,
    set_adapter,
    setup_lora_for_medical_finetuning,
)
from tests.support.models import TokenLinear, Tokens, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs

accelerate = pytest.importorskip("accelerate")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

IDS = torch.tensor([[0, 3, 1, 4, 2], [5, 5, 1, 0, 2]])
KINDS = ("linear", "conv", "embedding")
TARGETS = ("table", "conv", "fc", "proj")


class Mixed(nn.Module):
    """One layer of each kind, and a head that no adapter targets."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 12)
        self.proj = Conv1D(8, 12)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.conv(self.table(ids).mT).mT
        return self.head(self.proj(torch.tanh(self.fc(x))))


def mixed():
    torch.manual_seed(0)
    return Mixed()


def to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model, folder):
    accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def by_device_map(model, folder):
    device_map = dict.fromkeys(("table", "conv", "fc", "head"), "disk") | {"proj": "cpu"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


OFFLOADS = {"cpu": to_cpu, "disk": to_disk, "device_map": by_device_map}
CONFIGS = {
    "plain": LoRAConfig(TARGETS, match="exact", kinds=KINDS),
    "dropout": LoRAConfig(TARGETS, match="exact", kinds=KINDS, dropout=0.4),
    "dora": LoRAConfig(("fc", "proj"), match="exact", use_dora=True),
    "pissa": LoRAConfig(("fc", "proj"), match="exact", init_lora_weights="pissa"),
    "olora": LoRAConfig(("fc", "proj"), match="exact", init_lora_weights="olora"),
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    return lambda model: OFFLOADS[request.param](model, tmp_path / "offload")


def pair(offload, config="plain"):
    """(offloaded, the same model in memory, the same in float64), with the same random adapters."""
    models = (mixed(), mixed(), mixed().double())
    offload(models[0])
    for model in models:
        torch.manual_seed(1)
        inject_lora(model, CONFIGS[config])
        freeze_base_params(model)
    adapter = get_lora_state_dict(models[0])
    for model in models[1:]:
        load_lora_state_dict(model, adapter)
    for model in models:
        with torch.no_grad():
            for index, parameter in enumerate(get_lora_params(model)):
                generator = torch.Generator().manual_seed(index)
                values = torch.randn(parameter.shape, generator=generator)
                parameter.add_(values.to(parameter.device), alpha=0.3)
    return models


@pytest.mark.parametrize("config", CONFIGS)
def test_an_offloaded_model_computes_and_trains_as_in_memory(offload, config):
    models = pair(offload, config)
    outputs = []
    for model in models:
        for _ in range(2):  # a second call, after the weights went back
            torch.manual_seed(5)
            output = model(IDS)
        output.square().sum().backward()
        outputs.append(output.detach())
    assert models[0].fc.original_linear.weight.is_meta  # it is still offloaded
    assert_close(*outputs, config)
    gradients = [[p.grad for p in get_lora_params(model)] for model in models]
    for got, want, exact in zip(*gradients, strict=True):
        assert_close(got, want, exact)
    with disable_adapter(models[0]):
        base = models[0](IDS)
    assert_close(base, mixed()(IDS), mixed().double()(IDS))
    assert_differs(outputs[0], base)


def test_a_new_adapter_on_an_offloaded_layer_changes_nothing(offload):
    for config in CONFIGS.values():
        model = mixed()
        offload(model)
        inject_lora(model, config)
        exact = mixed().double()(IDS)
        assert_close(model(IDS), mixed()(IDS), exact)


def test_the_weight_of_an_offloaded_layer_is_the_merged_one(offload):
    for config in ("plain", "dora"):
        offloaded, memory, _ = pair(offload, config)
        for name in ("fc", "proj") if config == "dora" else TARGETS:
            layer, twin = getattr(offloaded, name), getattr(memory, name)
            assert torch.equal(layer.weight, twin.weight)
            assert torch.equal(layer.delta(torch.float64), twin.delta(torch.float64))


def test_an_offloaded_model_saves_and_loads(offload, tmp_path):
    offloaded, memory, exact = pair(offload)
    save_adapter(offloaded, tmp_path / "a.safetensors")
    save_pretrained(offloaded, tmp_path / "peft")
    for load in ("file", "folder"):
        fresh = mixed()
        offload(fresh)
        if load == "file":
            inject_lora(fresh, CONFIGS["plain"])
            load_adapter(fresh, tmp_path / "a.safetensors")
        else:
            from_pretrained(fresh, tmp_path / "peft")
        assert_close(fresh(IDS), memory(IDS), exact(IDS))
        for got, want in zip(get_lora_params(fresh), get_lora_params(memory), strict=True):
            assert torch.equal(got, want)


def test_the_base_state_of_an_offloaded_model_has_its_values(offload):
    state = base_state_dict(pair(offload)[0])
    want = mixed().state_dict()
    assert state.keys() == want.keys()
    assert all(torch.equal(state[key], want[key]) for key in want)


def test_merging_offloaded_weights_is_refused(offload):
    model = pair(offload)[0]
    with pytest.raises(MergeError, match="fc: the weight is offloaded by accelerate"):
        merge_lora_weights(model)
    assert isinstance(model.fc, fastlora.LoRALinear)


def test_adapters_of_an_offloaded_model_are_switched(offload):
    model, memory, _ = pair(offload)
    for m in (model, memory):
        torch.manual_seed(3)
        add_adapter(m, "b", CONFIGS["plain"], activate=True)
        randomise_adapters(m, 4)
    assert torch.equal(get_lora_params(model)[0], get_lora_params(memory)[0])
    for name in ("b", "default", None):
        set_adapter(model, name)
        set_adapter(memory, name)
        assert_close(model(IDS), memory(IDS), copy.deepcopy(memory).double()(IDS), str(name))


def test_check_and_copies_work_on_an_offloaded_model(offload):
    model = pair(offload)[0]
    assert check(model, IDS).ok
    twin = copy.deepcopy(model)  # an average of the weights
    assert torch.equal(twin(IDS), model(IDS))
    with torch.no_grad():
        twin.fc.lora_B.zero_()
    assert_differs(twin(IDS), model(IDS))


def test_a_module_that_trains_may_not_be_offloaded(offload):
    model = mixed()
    offload(model)
    config = LoRAConfig(("fc",), modules_to_save=("head",))
    with pytest.raises(InjectionError, match="modules_to_save: head is offloaded by accelerate"):
        inject_lora(model, config)
    with pytest.raises(InjectionError, match="bias: .* is offloaded by accelerate"):
        inject_lora(model, LoRAConfig(("fc",), bias="all"))
    with pytest.raises(InjectionError, match="output_layer_names: head is offloaded"):
        model.to_out, model.fc = model.fc, nn.Identity()  # its default target
        setup_lora_for_medical_finetuning(model, output_layer_names=("head",))
    assert not [m for m in model.modules() if isinstance(m, fastlora.LoRALayer)]


def test_values_are_not_loaded_into_offloaded_parameters(offload, tmp_path):
    model, memory, _ = pair(offload)
    with pytest.raises(CheckpointError, match=r"fc.weight: is on the meta device in the model"):
        load_base_state_dict(model, mixed().state_dict())
    memory.head.requires_grad_(True)
    save_pretrained(memory, tmp_path / "heads")
    fresh = mixed()
    offload(fresh)
    with pytest.raises(CheckpointError, match=r"head.weight: is on the meta device in the model"):
        from_pretrained(fresh, tmp_path / "heads")
    model.head.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"head.weight: is on the meta device"):
        save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"head.weight: is on the meta device"):
        get_lora_state_dict(model, include_trainable=True)


def test_a_hook_that_loads_submodules_by_name_is_refused():
    model = nn.Sequential(mixed())
    accelerate.hooks.attach_align_device_hook(
        model, torch.device("cpu"), offload=True, preload_module_classes=["Mixed"]
    )
    with pytest.raises(InjectionError, match="0.fc: accelerate loads it by name in the hook of 0"):
        inject_lora(model, ["fc"])
    assert_close(model(IDS), mixed()(IDS), mixed().double()(IDS))


@pytest.mark.parametrize("kind", [nn.Linear, TokenLinear])
@pytest.mark.parametrize("hook", ["offload", "torch"])
def test_token_objects_go_through_a_layer_with_hooks(kind, hook):
    torch.manual_seed(0)
    models = [nn.Sequential(kind(8, 4))]
    models += [copy.deepcopy(models[0]), copy.deepcopy(models[0]).double()]
    if hook == "offload":
        to_cpu(models[0], None)
    else:
        models[0][0].register_forward_hook(lambda *_: None)
    outputs = []
    for model in models:
        torch.manual_seed(1)
        inject_lora(model, ["0"])
    load_lora_state_dict(models[2], get_lora_state_dict(models[0]))
    for model in models:
        randomise_adapters(model)
        x = torch.ones(3, 8).to(model[0].lora_A.dtype)
        outputs.append(model(Tokens(x)).feats)
        with disable_adapter(model):
            assert_differs(model(Tokens(x)).feats, outputs[-1])
    assert_close(*outputs)


def test_chained_hooks_are_found():
    model = mixed()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for _ in range(2):
        accelerate.hooks.add_hook_to_module(model.fc, accelerate.hooks.ModelHook(), append=True)
    inject_lora(model, ["fc"])
    assert not model.fc.lora_A.is_meta
    assert torch.equal(model(IDS), mixed()(IDS))


def test_removing_the_hooks_leaves_a_model_in_memory():
    offloaded, memory, exact = pair(lambda model: to_cpu(model, None))
    accelerate.hooks.remove_hook_from_submodules(offloaded)
    assert not any(p.is_meta for p in offloaded.parameters())
    assert_close(offloaded(IDS), memory(IDS), exact(IDS))
    merge_lora_weights(offloaded)
    assert_close(offloaded(IDS), memory(IDS), exact(IDS))


def test_adapters_offloaded_after_injection_compute_right_and_say_that_they_do_not_train(
    offload, tmp_path
):
    models = (mixed(), mixed(), mixed().double())
    for model in models:
        torch.manual_seed(1)
        inject_lora(model, LoRAConfig(TARGETS, match="exact", kinds=KINDS))
        randomise_adapters(model)
    load_lora_state_dict(models[2], get_lora_state_dict(models[1]))
    load_lora_state_dict(models[0], get_lora_state_dict(models[1]))
    accelerate.disk_offload(models[0], str(tmp_path), execution_device=torch.device("cpu"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(*(model(IDS) for model in models))
    with pytest.warns(FastLoRAWarning, match="so training does not change them"):
        models[0](IDS)
    report = check(models[0], IDS)
    assert [finding.path for finding in report.findings] == list(TARGETS)
    assert "are offloaded by accelerate" in str(report)
    with pytest.raises(CheckpointError, match="lora_A: is on the meta device, so it has no value"):
        save_adapter(models[0], tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="lora_A: is on the meta device in the model"):
        load_lora_state_dict(models[0], get_lora_state_dict(models[1]))
    set_adapter(models[0], None)
    assert torch.equal(models[0](IDS), mixed()(IDS))
    set_adapter(models[0], "default")
    with torch.no_grad():
        assert_close(*(model(IDS) for model in models))


@pytest.mark.gpu
def test_inputs_on_another_device_are_moved_as_the_base_layer_moves_them(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    models = pair(lambda model: accelerate.cpu_offload(model, torch.device("cuda", 0)))
    offloaded, memory, exact = models
    assert all(p.is_cuda for p in get_lora_params(offloaded))
    x, ids = torch.randn(3, 8), IDS  # on the CPU, where no hook of a parent moves them
    assert_close(offloaded.fc(x).cpu(), memory.fc(x), exact.fc(x.double()))
    assert_close(offloaded.table(ids).cpu(), memory.table(ids), exact.table(ids))
    x = torch.randn(2, 8, 5)
    assert_close(offloaded.conv(x).cpu(), memory.conv(x), exact.conv(x.double()))


def test_a_plain_meta_model_keeps_its_adapters_on_meta():
    with torch.device("meta"):
        model = Mixed()
    inject_lora(model, CONFIGS["plain"])
    assert all(p.is_meta for p in get_lora_params(model))
    assert model(IDS.to("meta")).shape == (2, 5, 3)
    report = check(model, IDS.to("meta"))
    assert "on the meta device and has no values" in str(report) and len(report.findings) == 4
