"""Saving and loading the adapter and the heads of a model that FSDP shards over two processes: full tensors, or an error."""

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from fastlora import (
    CheckpointError,
    LoRAConfig,
    freeze_base_params,
    from_pretrained,
    get_lora_state_dict,
    get_trainable_params,
    inject_lora,
    load_adapter,
    load_lora_state_dict,
    save_adapter,
    save_pretrained,
)
from fastlora.model.sharded import is_dtensor
from tests.support.models import randomise_adapters
from tests.support.processes import run_processes

X = torch.linspace(-1, 1, 40).view(5, 8)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def trained(**settings):
    """A model in one process, with an adapter and a head that have values of their own."""
    model = plain()
    inject_lora(model, LoRAConfig(["0"], rank=2, modules_to_save=["2"], **settings))
    freeze_base_params(model)
    randomise_adapters(model)
    with torch.no_grad():
        model[2].weight.mul_(2)
    return model


def same(state, want):
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor), name


def in_shards(folder, settings):
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    want = get_lora_state_dict(trained(**settings), include_trainable=True)
    model = trained(**settings)
    for module in (*model, model):
        fully_shard(module)
    assert all(is_dtensor(parameter) for parameter in get_trainable_params(model))
    same(get_lora_state_dict(model, include_trainable=True), want)
    save_adapter(model, folder / f"{rank}.safetensors")
    same(load_file(folder / f"{rank}.safetensors"), want)
    save_pretrained(model, folder / f"{rank}")
    fresh = plain()
    from_pretrained(fresh, folder / f"{rank}")
    torch.testing.assert_close(fresh(X), trained(**settings)(X))
    with torch.no_grad():
        for parameter in get_trainable_params(model):
            parameter.zero_()
    load_adapter(model, folder / f"{rank}.safetensors")
    same(get_lora_state_dict(model, include_trainable=True), want)
    return True


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}])
def test_shards_of_fsdp2_are_saved_and_loaded_whole(tmp_path, settings):
    assert run_processes(2, in_shards, tmp_path, settings) == [True, True]


def in_flat_parts(folder):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    folder = folder / str(dist.get_rank())
    folder.mkdir()
    want = get_lora_state_dict(trained(), include_trainable=True)
    model = FSDP(trained(), use_orig_params=True, device_id=torch.device("cpu"))
    model(X)
    for refused in (
        lambda: get_lora_state_dict(model),
        lambda: save_adapter(model, folder / "a.safetensors"),
        lambda: save_pretrained(model, folder / "a"),
        lambda: load_lora_state_dict(model, want),
    ):
        with pytest.raises(CheckpointError, match="FSDP1 shards it, and .*summon_full_params"):
            refused()
    assert not list(folder.iterdir())
    other = {name: tensor + 1 for name, tensor in want.items()}
    with FSDP.summon_full_params(model):
        same(get_lora_state_dict(model, include_trainable=True), want)
        load_lora_state_dict(model, other)
    with FSDP.summon_full_params(model):
        same(get_lora_state_dict(model, include_trainable=True), other)
        assert torch.equal(copy.deepcopy(model.module[2].weight), other["2.weight"])
    return True


def test_parts_of_fsdp1_are_refused_until_they_are_whole(tmp_path):
    assert run_processes(2, in_flat_parts, tmp_path) == [True, True]
