"""What trains is what is saved, and what is saved comes back: heads, biases, running statistics, in every format."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from fastlora import (
    CheckpointError,
    FastLoRAWarning,
    InjectionError,
    LoRAConfig,
    add_adapter,
    base_state_dict,
    count_parameters,
    delete_adapter,
    freeze_base_params,
    from_pretrained,
    get_lora_params,
    get_lora_state_dict,
    get_trainable_params,
    inject_lora,
    load_adapter,
    load_base_state_dict,
    load_lora_state_dict,
    loraplus_groups,
    merged_model,
    print_trainable_parameters,
    reset_lora_parameters,
    save_adapter,
    save_pretrained,
    set_adapter,
    setup_lora_for_medical_finetuning,
)
from fastlora.cli.commands import main
from tests.support.models import Decoder, randomise_adapters

X = torch.linspace(-1, 1, 40).view(5, 8)


class Segmenter(nn.Module):
    """A backbone with a normalisation layer, and a head with two, of which one has no parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def without_warnings(function):
    def call(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastLoRAWarning)
            return function(*args)

    return call


get_lora_params_silently = without_warnings(get_lora_params)
# What a user calls after unfreezing a head by hand.
SEEN_BY = {
    "optimizer": get_trainable_params,
    "count": count_parameters,
    "print": print_trainable_parameters,
    "adapters": get_lora_params_silently,
    "saved": without_warnings(get_lora_state_dict),
    "frozen again": without_warnings(freeze_base_params),
}


def trained(how):
    """A model whose adapter and head have trained. how: "config", or the call that follows after the head was unfrozen by hand, if any."""
    model = Segmenter()
    config = LoRAConfig(["body"], rank=2, modules_to_save=["head"] if how == "config" else ())
    inject_lora(model, config)
    freeze_base_params(model)
    if how != "config":
        model.head.requires_grad_(True)
    if how in SEEN_BY:
        SEEN_BY[how](model)
    model.norm.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.head[0].weight, Segmenter().head[0].weight)
    return model.eval()


def injected():
    model = Segmenter()
    inject_lora(model, ["body"], rank=2)
    return model


def through_state_dict(model, folder):
    torch.save(get_lora_state_dict(model, include_trainable=True), folder / "a.pt")
    fresh = injected()
    load_lora_state_dict(fresh, torch.load(folder / "a.pt", weights_only=True))
    return fresh


def through_file(model, folder):
    save_adapter(model, folder / "a.safetensors")
    fresh = injected()
    load_adapter(fresh, folder / "a.safetensors")
    return fresh


def through_folder(model, folder):
    save_pretrained(model, folder)
    fresh = Segmenter()
    from_pretrained(fresh, folder)
    return fresh


def through_named_adapter(model, folder):
    save_pretrained(model, folder)
    fresh = Segmenter()
    from_pretrained(fresh, folder, adapter="mine")
    set_adapter(fresh, "mine")
    return fresh


ROUTES = [through_state_dict, through_file, through_folder, through_named_adapter]


def average(model):
    """A copy as a moving average keeps it."""
    return copy.deepcopy(model).requires_grad_(False)


def frozen(model):
    return model.requires_grad_(False)


def frozen_again(model):
    freeze_base_params(model)
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model)).requires_grad_(False)


def synchronised(model):
    """A copy whose normalisation layers were replaced, as for several processes."""
    return average(nn.SyncBatchNorm.convert_sync_batchnorm(model))


@pytest.mark.parametrize("change", [average, frozen, frozen_again, pickled, synchronised])
@pytest.mark.parametrize("how", ["config", *SEEN_BY])
@pytest.mark.parametrize("route", ROUTES)
def test_heads_are_saved_whatever_requires_grad_is(route, how, change, tmp_path):
    model = trained(how)
    want = model(X)
    assert torch.equal(route(change(model), tmp_path).eval()(X), want)


@pytest.mark.parametrize("change", [average, frozen, pickled, synchronised])
@pytest.mark.parametrize("save", [get_lora_state_dict, save_adapter, save_pretrained])
def test_a_head_that_nothing_recorded_is_named(save, change, tmp_path):
    """Unfrozen by hand, trained from another list of parameters, and frozen by hand."""
    arguments = () if save is get_lora_state_dict else (tmp_path / "out",)
    model = change(trained("by hand"))
    with pytest.warns(FastLoRAWarning) as caught:
        save(model, *arguments)
    text = " ".join(str(w.message) for w in caught)
    assert f"{save.__name__}: the running statistics of head.1, head.2 changed since" in text
    assert (
        f"{save.__name__}: head.0.weight, head.1.weight, head.1.bias, head.3.weight and 1" in text
    )
    assert "body" not in text and "norm" not in text.replace("normalisation", "")


def test_a_head_that_was_loaded_while_it_trained_is_named():
    """A run is resumed, and frozen by hand before it is saved."""
    model = injected()
    freeze_base_params(model)
    model.head.requires_grad_(True)
    model.load_state_dict(trained("config").state_dict())
    with pytest.warns(FastLoRAWarning) as caught:
        get_lora_state_dict(model.requires_grad_(False))
    text = " ".join(str(w.message) for w in caught)
    assert "dict: head.0.weight, head.1.weight, head.1.bias, head.3.weight and 1 more ch" in text
    assert "the running statistics of head.1, head.2 changed" in text


def test_freezing_again_keeps_what_was_unfrozen_and_says_so():
    model = injected()
    freeze_base_params(model)
    model.head[0].bias.requires_grad_(True)
    with pytest.warns(FastLoRAWarning, match="head.0.bias train since an earlier call and are"):
        freeze_base_params(model)
    assert model.head[0].bias.requires_grad
    model.head[0].bias.requires_grad_(False)  # as the warning says
    assert not any(p.requires_grad for p in model.head.parameters())


def test_freezing_again_names_what_trained_with_the_whole_model():
    model = injected()
    freeze_base_params(model)
    model.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.add_(0.1)
    with pytest.warns(FastLoRAWarning, match="freeze_base_params: norm.weight changed or were"):
        freeze_base_params(model)
    assert not any(p.requires_grad for p in (*model.head.parameters(), *model.norm.parameters()))
    get_lora_state_dict(model)  # said once


def test_a_head_that_was_replaced_after_freezing_is_named():
    model = injected()
    freeze_base_params(model)
    model.head[0] = nn.Linear(8, 8).requires_grad_(False)
    with pytest.warns(FastLoRAWarning, match="head.0.weight, head.0.bias changed or were"):
        get_lora_state_dict(model)


def test_what_was_added_after_freezing_is_named():
    model = injected()
    freeze_base_params(model)
    model.classes = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    outer = nn.ModuleDict({"model": copy.deepcopy(model), "other": nn.Linear(2, 2)})
    with pytest.warns(
        FastLoRAWarning, match="dict: model.classes.0.weight, .*, model.classes.1.bias changed or"
    ):
        get_lora_state_dict(outer.requires_grad_(False))
    model.head[3] = nn.Linear(8, 4).requires_grad_(False)  # of another shape
    with pytest.warns(FastLoRAWarning, match="dict: head.3.weight, head.3.bias changed or"):
        state = get_lora_state_dict(model, include_trainable=True)
    assert "classes.0.weight" in state  # it trains


def test_values_that_cannot_be_sampled_are_no_change():
    model = injected()
    model.head[0].to("meta")
    freeze_base_params(model)
    model.head[0].to_empty(device="cpu").reset_parameters()
    model.head[3].weight.data = torch.empty(0)  # as DeepSpeed partitions it
    model.norm.weight._fsdp_flattened = True
    model.norm.weight.data = torch.zeros(3)
    get_lora_state_dict(model)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize(
    "normalise", [nn.utils.weight_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_a_head_that_was_parametrised_is_saved_or_named(normalise, seen):
    model = injected()
    freeze_base_params(model)
    model.head.requires_grad_(True)
    if seen:
        count_parameters(model)
    normalise(model.head[0])
    parameters = {n: p for n, p in model.named_parameters() if "head.0" in n}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1)
    frozen(model)
    if seen:
        assert parameters.keys() <= get_lora_state_dict(model, include_trainable=True).keys()
    else:
        with pytest.warns(FastLoRAWarning, match=f"{min(parameters, key=len)}.* changed or were"):
            get_lora_state_dict(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions_and_averages_are_no_change(dtype):
    model = injected()
    freeze_base_params(model)
    get_lora_state_dict(model.to(dtype))
    get_lora_state_dict(model.bfloat16())
    get_lora_state_dict(model.float())
    freeze_base_params(model)
    mean = AveragedModel(model, avg_fn=lambda average, new, _: 0.999 * average + 0.001 * new)
    for _ in range(2000):
        mean.update_parameters(model)
    assert not torch.equal(mean.module.head[0].weight, model.head[0].weight)  # it drifts
    get_lora_state_dict(mean)


def test_weights_loaded_after_freezing_are_named_except_those_of_the_base():
    model, other = injected(), Segmenter()
    freeze_base_params(model)
    with torch.no_grad():
        other.head[0].weight.add_(1.0)
    load_base_state_dict(model, other.state_dict())
    get_lora_state_dict(model)
    with torch.no_grad():
        other.head[0].weight.add_(1.0)
    model.head.load_state_dict(other.head.state_dict())
    with pytest.warns(FastLoRAWarning, match="dict: head.0.weight changed or were added since"):
        get_lora_state_dict(model)


def test_statistics_of_a_resumed_run_are_named():
    """The checkpoint of the run holds them, but the adapter does not."""
    run = injected()
    freeze_base_params(run)
    run.train()(X)
    model = injected()
    freeze_base_params(model)
    model.load_state_dict(run.state_dict())
    with pytest.warns(FastLoRAWarning, match="the running statistics of norm, head.1, head.2 chan"):
        get_lora_state_dict(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_unusual_parameters_and_modules_are_frozen_and_saved():
    model = injected()
    model.sparse = nn.Parameter(torch.eye(4).to_sparse())
    model.csr = nn.Parameter(torch.eye(4).to_sparse_csr())
    model.integer = nn.Parameter(torch.arange(4), requires_grad=False)
    model.complex = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    model.scripted = torch.jit.script(nn.Linear(8, 8))
    model.register_buffer("running_mean", torch.zeros(()), persistent=False)  # a meter
    freeze_base_params(model)
    model.running_mean.add_(1.0)
    get_lora_state_dict(model)
    model.complex.data.add_(1.0)
    with pytest.warns(FastLoRAWarning, match="dict: complex changed or were added since"):
        get_lora_state_dict(model)


def test_records_do_not_move_to_the_module_that_takes_the_place_of_another():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    inject_lora(model, LoRAConfig(["0"], modules_to_save=["2"]))
    freeze_base_params(model)
    head = model[2]
    del model[1]
    assert set(get_trainable_params(model)) == {
        *get_lora_params_silently(model),
        *head.parameters(),
    }
    state = get_lora_state_dict(model.requires_grad_(False), include_trainable=True)
    assert "1.weight" in state and "2.weight" not in state
    del model[1]
    assert not any("weight" in key for key in get_lora_state_dict(model, include_trainable=True))


def test_weights_that_were_on_meta_when_frozen_are_known_after_the_reset():
    with torch.device("meta"):
        model = injected()
    freeze_base_params(model)
    model.to_empty(device="cpu").load_state_dict(injected().state_dict())
    reset_lora_parameters(model)
    get_lora_state_dict(model)
    model.head[0].bias.data.add_(1.0)
    model.train()(X)
    reset_lora_parameters(model)  # which keeps what is known
    with pytest.warns(FastLoRAWarning) as caught:
        get_lora_state_dict(model)
    text = " ".join(str(w.message) for w in caught)
    assert "dict: head.0.bias changed" in text and "norm, head.1, head.2 changed" in text


def test_a_model_without_adapters_is_pickled_without_the_package():
    model = injected()
    freeze_base_params(model)
    model.body = model.body.merge_weights()  # by hand
    assert b"fastlora." not in pickle.dumps(model.head)


def test_samples_are_not_of_one_column():
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
    inject_lora(model, ["0"])
    freeze_base_params(model)
    model[1].weight.data[:, 1:].add_(1.0)  # as if the first feature were always 0
    with pytest.warns(FastLoRAWarning, match="dict: 1.weight changed or were added since"):
        get_lora_state_dict(model)


def test_a_base_that_was_frozen_in_part_before_injection_is_not_frozen():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.extractor, self.body, self.head = (nn.Linear(8, 8) for _ in range(3))
            self.more = nn.Linear(8, 8)
            self.extractor.requires_grad_(False)

    model = Deep()
    inject_lora(model, ["extractor", "body", "more"])
    with pytest.raises(InjectionError, match="its base is not frozen"):
        get_trainable_params(model)
    get_lora_params(model)  # no heads are named
    assert freeze_base_params(model)[1] == count_parameters(model)["lora"]


def test_an_adapted_weight_may_train_beside_its_adapter():
    model = Segmenter()
    inject_lora(model, ["body", "head.0"])
    freeze_base_params(model)
    model.body.original_linear.requires_grad_(True)  # half of the adapted weights
    count_parameters(model)
    state = get_lora_state_dict(average(model), include_trainable=True)
    assert "body.original_linear.weight" in state and "head.0.original_linear.weight" not in state


def test_an_adapted_weight_that_was_loaded_is_saved_again(tmp_path):
    model = Segmenter()
    inject_lora(model, LoRAConfig(["body", "head.0"], modules_to_save=["head.3"]))
    freeze_base_params(model)
    model.body.original_linear.requires_grad_(True)
    model.body.original_linear.weight.data.add_(1.0)
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = Segmenter()
    inject_lora(fresh, ["body", "head.0"])
    load_adapter(fresh, tmp_path / "a.safetensors")
    freeze_base_params(fresh)
    save_adapter(fresh, tmp_path / "b.safetensors")
    first, again = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == again.keys() and "body.original_linear.weight" in again


def test_a_model_without_an_active_adapter_has_no_heads():
    model = injected()
    freeze_base_params(model)
    add_adapter(model, "other", ["head.3"])
    set_adapter(model, None)
    model.requires_grad_(True)
    count_parameters(model)
    set_adapter(model, "other")
    freeze_base_params(model)
    assert count_parameters(model)["trainable"] == count_parameters(model)["lora"]


def test_what_trained_before_the_first_freezing_is_no_head():
    """In a model whose body was frozen before injection, counting does not turn the rest into heads."""
    model = Segmenter()
    model.body.requires_grad_(False)
    inject_lora(model, ["body"])
    count_parameters(model)
    freeze_base_params(model)
    assert not any(p.requires_grad for p in model.head.parameters())


def test_output_layers_of_the_setup_are_saved_whatever_requires_grad_is(tmp_path):
    model, twin = Decoder(), Decoder()
    twin.load_state_dict(model.state_dict())
    setup_lora_for_medical_finetuning(model)
    with torch.no_grad():
        for parameter in get_trainable_params(model):
            parameter.add_(0.1)
    save_pretrained(average(model), tmp_path)
    from_pretrained(twin, tmp_path)
    assert torch.equal(twin(X), model(X))
    assert twin.out_layer.weight.requires_grad and not twin.input_layer.weight.requires_grad


@pytest.mark.parametrize("route", ROUTES)
def test_loaded_heads_train_and_are_saved_again(route, tmp_path):
    fresh = route(trained("config"), tmp_path)
    freeze_base_params(fresh)
    assert all(p.requires_grad for p in fresh.head.parameters())
    assert not fresh.norm.weight.requires_grad
    with torch.no_grad():
        for p in get_trainable_params(fresh):
            p.add_(0.1)
    again = tmp_path / "again"
    again.mkdir()
    assert torch.equal(route(average(fresh), again).eval()(X), fresh.eval()(X))


@pytest.mark.parametrize("route", ROUTES)
def test_running_statistics_of_heads_are_saved(route, tmp_path):
    model = trained("config")
    got = route(model, tmp_path)
    for one, other in zip(got.head.buffers(), model.head.buffers(), strict=True):
        assert torch.equal(one, other)
    assert got.head[1].num_batches_tracked == got.head[2].num_batches_tracked == 3
    state = get_lora_state_dict(model, include_trainable=True)
    assert "head.2.running_var" in state and "norm.running_var" not in state


def test_a_trained_bias_brings_the_statistics_of_its_module():
    model = Segmenter()
    inject_lora(model, LoRAConfig(["body"], bias="all"))
    freeze_base_params(model)
    state = get_lora_state_dict(model, include_trainable=True)
    assert "norm.bias" in state and "norm.weight" not in state and "norm.running_mean" in state
    assert "head.2.running_mean" not in state  # no parameter of it trains


def test_non_persistent_buffers_are_not_saved(tmp_path):
    model = injected()
    model.head.register_buffer("cache", torch.ones(2), persistent=False)
    freeze_base_params(model)
    model.head.requires_grad_(True)
    save_adapter(model, tmp_path / "a.safetensors")
    assert not any("cache" in key for key in load_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("save", [get_lora_state_dict, save_adapter, save_pretrained])
def test_changed_statistics_of_frozen_layers_are_named(save, tmp_path):
    arguments = () if save is get_lora_state_dict else (tmp_path / "out",)
    model = injected()
    freeze_base_params(model)
    model.train()
    model.norm.eval(), model.head.eval()
    model(X)
    save(model, *arguments)  # nothing changed, so nothing is said
    model.train()(X)
    message = (
        rf"{save.__name__}: the running statistics of norm, head.1, head.2 changed since freeze"
    )
    with pytest.warns(FastLoRAWarning, match=message):
        save(copy.deepcopy(model), *arguments)


def test_statistics_loaded_with_the_base_are_not_a_change():
    model, other = injected(), Segmenter()
    other(X)
    freeze_base_params(model)
    load_base_state_dict(model, other.state_dict())
    get_lora_state_dict(model)
    get_lora_state_dict(model.half())


def test_get_trainable_params_is_everything_that_trains():
    model = injected()
    with pytest.raises(InjectionError, match="its base is not frozen, so all of it would train"):
        get_trainable_params(model)
    freeze_base_params(model)
    assert get_trainable_params(model) == get_lora_params(model)
    model.head.requires_grad_(True)
    wanted = [*model.body.lora_parameters().values(), *model.head.parameters()]
    assert get_trainable_params(model) == wanted
    groups = loraplus_groups(model, 1e-3)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in wanted}
    with pytest.warns(
        FastLoRAWarning, match=r"only the adapters, but head.0.weight, .* and 2 more"
    ):
        assert get_lora_params(model) == wanted[:2]
    plain = Segmenter()
    assert get_trainable_params(plain) == list(plain.parameters())


def test_the_adapters_alone_are_not_saved_in_silence(tmp_path):
    """Setup, `torch.save(get_lora_state_dict(model))`, injection and a strict load lose the output layer."""
    model = Decoder()
    setup_lora_for_medical_finetuning(model)
    with pytest.warns(FastLoRAWarning, match="leaves out out_layer.weight, out_layer.bias"):
        state = get_lora_state_dict(model)
    twin = Decoder()
    setup_lora_for_medical_finetuning(twin)
    with pytest.warns(FastLoRAWarning, match="does not hold out_layer.weight, out_layer.bias"):
        load_lora_state_dict(twin, state)


def test_an_older_file_without_statistics_loads_and_names_them(tmp_path):
    model = trained("config")
    save_adapter(model, tmp_path / "new.safetensors")
    state = load_file(tmp_path / "new.safetensors")
    old = {key: value for key, value in state.items() if "running" not in key and "num" not in key}
    save_file(old, tmp_path / "old.safetensors")
    twin = trained("config")
    with pytest.warns(FastLoRAWarning, match="does not hold head.1.running_mean, .* and 2 more"):
        load_adapter(twin, tmp_path / "old.safetensors")
    assert torch.equal(twin.head[3].weight, model.head[3].weight)


def test_a_state_dict_does_not_follow_training():
    model = trained("config")
    state = get_lora_state_dict(model, include_trainable=True)
    before = {key: value.clone() for key, value in state.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.train()(X)
    assert all(torch.equal(state[key], before[key]) for key in before)


class Tied(nn.Module):
    """A language model whose head shares the weight of its table, or not."""

    def __init__(self, tie=True):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.body(self.table(ids)))


IDS = torch.arange(6)


def tied_and_trained(tie=True, heads=("head",)):
    model = Tied(tie)
    inject_lora(model, LoRAConfig(["body"], modules_to_save=heads))
    freeze_base_params(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    randomise_adapters(model)
    return model


def test_a_tied_head_is_saved_under_all_its_names_and_stays_tied(tmp_path):
    model = tied_and_trained()
    save_adapter(average(model), tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    assert torch.equal(state["head.weight"], state["table.weight"])
    save_file(get_lora_state_dict(model, include_trainable=True), tmp_path / "b.safetensors")
    # One name is enough, as in files of earlier versions.
    save_file({k: v for k, v in state.items() if k != "head.weight"}, tmp_path / "c.safetensors")
    for name in "abc":
        twin = tied_and_trained()
        twin.head.weight.data.zero_()
        load_adapter(twin, tmp_path / f"{name}.safetensors")
        assert torch.equal(twin(IDS), model(IDS)) and twin.head.weight is twin.table.weight


def test_a_folder_with_an_adapted_tied_head_loads(tmp_path):
    """PEFT holds the trained table, and the head's weight inside its adapted layer."""
    model = Tied()
    inject_lora(model, LoRAConfig(["body", "head"], modules_to_save=["table"]))
    freeze_base_params(model)
    model.table.weight.data.add_(1.0)
    randomise_adapters(model)
    save_adapter(model, tmp_path / "a.safetensors")
    assert (
        main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "f"), "--to", "peft"]) == 0
    )
    mine = Tied()
    from_pretrained(mine, tmp_path / "f")
    assert torch.equal(mine(IDS), model(IDS))


def test_heads_that_were_not_tied_do_not_load_into_tied_ones():
    state = get_lora_state_dict(tied_and_trained(False, ("head", "table")), include_trainable=True)
    model = tied_and_trained()
    before = model(IDS)
    with pytest.raises(CheckpointError, match=r"head.weight: differs from table.weight, which is"):
        load_lora_state_dict(model, state)
    assert torch.equal(model(IDS), before)


def test_a_converted_tied_head_is_the_same_model_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = tied_and_trained().eval()
    save_adapter(model, tmp_path / "a.safetensors")
    assert (
        main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "f"), "--to", "peft"]) == 0
    )
    theirs = peft.PeftModel.from_pretrained(Tied(), tmp_path / "f").eval()
    assert torch.equal(theirs(IDS), model(IDS))
    mine = Tied()
    from_pretrained(mine, tmp_path / "f")
    assert torch.equal(mine(IDS), model(IDS)) and mine.head.weight is mine.table.weight


def test_records_end_with_the_last_adapter_and_in_a_merged_model():
    model = trained("config")
    merged = merged_model(model)
    assert b"fastlora" not in pickle.dumps(merged)  # the merged model needs no fastlora
    inject_lora(merged, ["body"])
    freeze_base_params(merged)
    assert not any(p.requires_grad for p in merged.head.parameters())
    delete_adapter(model, "default")
    add_adapter(model, "new", ["body"], activate=True)
    freeze_base_params(model)
    assert not any(p.requires_grad for p in model.head.parameters())


compiles = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch"
)  # torch's own, when it is loaded
WRAPPERS = {
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "average": AveragedModel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@compiles
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_keys_have_no_parts_of_wrappers(wrap, tmp_path):
    model = trained("config")
    names = list(get_lora_state_dict(model, include_trainable=True))
    base = list(base_state_dict(model))
    wrapper = WRAPPERS[wrap](model)
    inner = next(m for m in wrapper.modules() if isinstance(m, Segmenter))
    assert list(get_lora_state_dict(wrapper, include_trainable=True)) == names
    keys = list(base_state_dict(wrapper))
    assert [key for key in keys if key != "n_averaged"] == base
    save_adapter(wrapper, tmp_path / "a.safetensors")
    assert sorted(load_file(tmp_path / "a.safetensors")) == sorted(names)
    save_pretrained(wrapper, tmp_path / "folder")
    for fresh, load, source in (
        (injected(), load_adapter, "a.safetensors"),
        (Segmenter(), from_pretrained, "folder"),
    ):
        wrapped = WRAPPERS[wrap](fresh)
        load(wrapped, tmp_path / source)
        got = next(m for m in wrapped.modules() if isinstance(m, Segmenter))
        assert torch.equal(got.eval()(X), inner.eval()(X))


@compiles
def test_a_compiled_submodule_leaves_no_part_in_the_keys(tmp_path):
    model, plain = trained("config"), trained("config")
    model.head = torch.compile(model.head)
    names = list(get_lora_state_dict(plain, include_trainable=True))
    assert list(get_lora_state_dict(model, include_trainable=True)) == names
    assert list(base_state_dict(model)) == list(base_state_dict(plain))
    save_pretrained(model, tmp_path)
    fresh = Segmenter()
    fresh.head = torch.compile(fresh.head)
    from_pretrained(fresh, tmp_path)
    for one, other in zip(fresh.head.parameters(), plain.head.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_files_of_wrapped_models_still_load(prefix, tmp_path):
    model = trained("config")
    state = get_lora_state_dict(model, include_trainable=True)
    fresh = injected()
    load_lora_state_dict(fresh, {prefix + key: value for key, value in state.items()})
    assert torch.equal(fresh.eval()(X), model(X))
    load_base_state_dict(fresh, {prefix + k: v for k, v in Segmenter().state_dict().items()})
    assert torch.equal(fresh.norm.weight, Segmenter().norm.weight)


def test_a_child_of_the_users_model_may_be_called_module(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Segmenter()

        def forward(self, x):
            return self.module(x)

    model = Outer()
    inject_lora(model, ["body"])
    freeze_base_params(model)
    randomise_adapters(model)
    assert all(key.startswith("module.body.") for key in get_lora_state_dict(model))
    save_adapter(model, tmp_path / "a.safetensors")
    twin = Outer()
    inject_lora(twin, ["body"])
    load_adapter(twin, tmp_path / "a.safetensors")
    assert torch.equal(twin.eval()(X), model.eval()(X))
    add_adapter(model, "second", ["body"])
    set_adapter(model, "second")


def test_loading_for_inference_warns_of_nothing(tmp_path):
    """An injected, not frozen model trains all of its base, about which nothing is known."""
    model = trained("config")
    save_adapter(model, tmp_path / "a.safetensors")
    state = get_lora_state_dict(model, include_trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(injected(), tmp_path / "a.safetensors")
        load_lora_state_dict(injected(), state)
        load_lora_state_dict(injected(), {k: v for k, v in state.items() if "lora" in k})


def test_a_file_of_a_model_that_was_not_frozen_freezes_as_any_other(tmp_path):
    save_adapter(injected(), tmp_path / "a.safetensors")
    fresh = injected()
    load_adapter(fresh, tmp_path / "a.safetensors")
    freeze_base_params(fresh)
    assert get_trainable_params(fresh) == get_lora_params(fresh)


@pytest.mark.parametrize("change", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_head_may_be_parametrised_after_injection(change):
    model = trained("config").train()
    change(model.head[3])
    state = get_lora_state_dict(model, include_trainable=True)
    assert any(
        key.startswith("head.3.") and "original0" in key or "weight_g" in key for key in state
    )
    assert len(get_trainable_params(model)) == 9


@compiles
def test_a_layer_that_is_compiled_by_itself_is_refused_by_name():
    model = Segmenter()
    model.body = torch.compile(model.body)
    with pytest.raises(InjectionError, match="body._orig_mod: is compiled by itself"):
        inject_lora(model, ["body"])
    model = injected()
    model.body = torch.compile(model.body)
    with pytest.raises(InjectionError, match="body._orig_mod: is compiled by itself"):
        set_adapter(model, None)
