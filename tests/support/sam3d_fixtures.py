"""The small package of `sam3d_package.py` made importable, and a model folder for it, for the tests of SAM 3D's path."""

import importlib
import os
import sys

import pytest
import torch

from fastlora.medical.sam3d.loading import ENVIRONMENT
from tests.support.sam3d_folder import TARGETS, fill, write_folder
from tests.support.sam3d_package import forget_package, write_package


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The small package, importable, with the environment variables that the loader set."""
    home = tmp_path_factory.mktemp("package")
    write_package(home)
    before, environment = forget_package(), dict(os.environ)
    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    sys.path.insert(0, str(home))
    yield home
    sys.path.remove(str(home))
    forget_package()
    sys.modules.update(before)
    os.environ.clear()
    os.environ.update(environment)


def build(part, config):
    """An instance of a part's class, with seeded weights."""
    if part == "structure":
        latent = importlib.import_module("sam3d_objects.model.backbone.tdfy_dit.models.mm_latent")
        mapping = {
            name: latent.Latent(8, config["model_channels"], lambda: "embedding")
            for name in config["latent_mapping"]
        }
        config = {**config, "latent_mapping": mapping}
    module, _, name = TARGETS[part].rpartition(".")
    torch.manual_seed(5)
    device = {"device": "cpu"} if part == "decoder" else {}
    model = getattr(importlib.import_module(module), name)(**config, **device)
    fill(model)
    return model


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory):
    """A model folder of the small package's parts."""
    os.environ["LIDRA_SKIP_INIT"] = "1"
    path = tmp_path_factory.mktemp("folder") / "checkpoints"
    write_folder(path, build, model_channels=16)
    del os.environ["LIDRA_SKIP_INIT"]
    forget_package()
    return path


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may corrupt."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path
