"""SAM 3D Objects' real modules with random weights, on a CPU. docs/sam3d.md has the command; skipped without a checkout."""

import importlib
import os

import pytest
import torch

import fastlora
from fastlora.medical.sam3d import TARGETS as COMPONENTS
from fastlora.medical.sam3d import load_part
from tests import sam3d_real
from tests.sam3d_real import CHECKOUT, TARGETS, fill, write_folder

if CHECKOUT not in os.environ:
    pytest.skip(f"{CHECKOUT} does not name a checkout of SAM 3D Objects", allow_module_level=True)
# Warnings of the package and of what it imports are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
sam3d_real.use_checkout()


def build(part, config):
    """The part's class itself, filled: what a checkpoint folder holds the weights of."""
    if part == "structure":
        mm = importlib.import_module(f"{sam3d_real.MODELS}.mm_latent")
        mapping = {}
        for name, about in config["latent_mapping"].items():
            embedder = dict(about["pos_embedder"])
            make = getattr(mm, embedder.pop("_target_").rpartition(".")[2])
            mapping[name] = mm.Latent(
                about["in_channels"], about["model_channels"], make(**embedder)
            )
        config = {**config, "latent_mapping": mapping}
    module, _, name = TARGETS[part].rpartition(".")
    device = {"device": "cpu"} if part == "decoder" else {}
    torch.manual_seed(5)
    model = getattr(importlib.import_module(module), name)(**config, **device)
    fill(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from fastlora.medical import sam3d

    sam3d.sparse_tensor()  # sets the environment before the package is imported
    return write_folder(tmp_path_factory.mktemp("sam3d") / "checkpoints", build)


@pytest.mark.parametrize(("part", "count"), [("decoder", 8), ("slat", 23), ("structure", 32)])
def test_parts_load_and_take_adapters_where_they_should(folder, part, count):
    model = load_part(folder, part)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    config = fastlora.LoRAConfig(list(COMPONENTS), rank=2)
    with pytest.warns() if part == "decoder" else __import__("contextlib").nullcontext():
        assert fastlora.inject_lora(model, list(COMPONENTS), rank=2) == count
