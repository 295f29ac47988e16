"""SAM 3D's parts from a model folder: what is built, what is refused, and the generators' loss."""

import logging
import os
import pickle
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.medical.sam3d.generator import flow_matching_loss
from fastlora.medical.sam3d.loading import ENVIRONMENT, FlowSettings, load_part
from tests.support.sam3d_folder import NAMES, TARGETS
from tests.support.sam3d_package import forget_package
from tests.support.tolerance import assert_follows

pytest_plugins = "tests.support.sam3d_fixtures"


def test_the_environment_is_set_unless_the_user_set_it_and_logged(folder, monkeypatch, caplog):
    forget_package()
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARSE_BACKEND", "torchsparse")
    caplog.set_level(logging.INFO)
    load_part(folder, "decoder")
    assert os.environ["SPARSE_BACKEND"] == "torchsparse" and os.environ["ATTN_BACKEND"] == "sdpa"
    assert "ATTN_BACKEND=sdpa" in caplog.text and "SPARSE_BACKEND" not in caplog.text


def test_without_the_package_there_is_one_line(folder, monkeypatch):
    forget_package()
    monkeypatch.setitem(sys.modules, "sam3d_objects", None)
    with pytest.raises(ConfigError, match="needs the package sam3d_objects .*docs/sam3d.md"):
        load_part(folder, "decoder")


@pytest.mark.parametrize("part", ["decoder", "structure"])
def test_a_part_has_its_weights_and_is_frozen(folder, part):
    model = load_part(folder, part)
    config = {"model_channels": 16, **yaml.safe_load((folder / f"{NAMES[part]}.yaml").read_text())}
    assert type(model).__name__ == TARGETS[part].rpartition(".")[2], config
    saved = torch.load(folder / f"{NAMES[part]}.pt", weights_only=True)
    inside = "_base_models.generator.reverse_fn.backbone."
    if part == "structure":
        saved = {k.removeprefix(inside): v for k, v in saved["state_dict"].items() if inside in k}
        assert saved.pop("condition_embedder.scale") == 1  # its output is given instead
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(model.state_dict()[key], saved[key]) for key in saved)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_safetensors_are_read_as_well(own_folder):
    state = torch.load(own_folder / "slat_decoder_mesh.pt", weights_only=True)
    save_file(state, own_folder / "decoder.safetensors")
    edit(own_folder / "pipeline.yaml", slat_decoder_mesh_ckpt_path="decoder.safetensors")
    loaded = load_part(own_folder, "decoder").state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def edit(path, **changes):
    """Changes entries of a YAML file; None removes them."""
    values = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))


def edit_state(folder, change):
    path = folder / "slat_decoder_mesh.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_latents(folder, change):
    path = folder / "ss_generator.yaml"
    values = yaml.safe_load(path.read_text())
    change(values["module"]["generator"]["backbone"]["reverse_fn"]["backbone"])
    path.write_text(yaml.safe_dump(values))


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


DECODER_YAML, PIPELINE = "slat_decoder_mesh.yaml", "pipeline.yaml"
CORRUPTED = {
    "a class of the system": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, _target_="os.system", command=f"touch {f}/ran"),
        "expected sam3d_objects.*as _target_, got 'os.system'",
    ),
    "no class": ("decoder", lambda f: edit(f / DECODER_YAML, _target_=None), "got None"),
    "another class of the package": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, _target_=TARGETS["structure"]),
        "SLatMeshDecoder as _target_, got",
    ),
    "a class below the model": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, representation_config={"_target_": "os.getcwd"}),
        "representation_config: expected no class as _target_, got 'os.getcwd'",
    ),
    "a class in a latent": (
        "structure",
        lambda f: edit_latents(
            f,
            lambda c: c["latent_mapping"]["pose"]["pos_embedder"].update(_target_="builtins.eval"),
        ),
        "latent_mapping: pose: pos_embedder: expected .* got 'builtins.eval'",
    ),
    "another generator": (
        "structure",
        lambda f: edit_latents(f, lambda c: c.update(_target_="a.b")),
        "ss_generator.yaml: expected one of .* as _target_, got 'a.b'",
    ),
    "positional arguments": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, _args_=[1]),
        "expected arguments of .*, got _args_",
    ),
    "a reference": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, attn_mode="${oc.env:HOME}"),
        "attn_mode: references are not resolved",
    ),
    "an unknown argument": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, depth=3),
        "SLatMeshDecoderTdfyWrapper cannot be built: .*depth",
    ),
    "a huge grid": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, resolution=8192),
        "resolution: expected a multiple of 8 up to 128, got 8192",
    ),
    "a huge number": (
        "decoder",
        lambda f: edit(f / DECODER_YAML, model_channels=10**9),
        "model_channels: expected a number within ±65536, got 1000000000",
    ),
    "code in YAML": (
        "decoder",
        lambda f: (f / DECODER_YAML).write_text(
            f"!!python/object/apply:os.system ['touch {f}/ran']"
        ),
        "cannot read .*slat_decoder_mesh.yaml: could not determine a constructor",
    ),
    "a list": (
        "decoder",
        lambda f: (f / PIPELINE).write_text("[1]"),
        "a mapping of names, got list",
    ),
    "no pipeline": ("decoder", lambda f: (f / PIPELINE).unlink(), "cannot read .*pipeline.yaml"),
    "a part that is not named": (
        "decoder",
        lambda f: edit(f / PIPELINE, slat_decoder_mesh_ckpt_path=None),
        "expected a path under 'slat_decoder_mesh_ckpt_path', got None",
    ),
    "a path above": (
        "decoder",
        lambda f: edit(f / PIPELINE, slat_decoder_mesh_config_path="a/../../x.yaml"),
        "inside .* got 'a/../../x.yaml'",
    ),
    "an absolute path": (
        "decoder",
        lambda f: edit(f / PIPELINE, slat_decoder_mesh_config_path="/etc/passwd"),
        "got '/etc/passwd'",
    ),
    "a path that no file can have": (
        "decoder",
        lambda f: edit(f / PIPELINE, slat_decoder_mesh_config_path="a" * 400),
        "slat_decoder_mesh_config_path: .*too long",
    ),
    "no weights": (
        "decoder",
        lambda f: (f / "slat_decoder_mesh.pt").unlink(),
        "slat_decoder_mesh_ckpt_path: no file",
    ),
    "code in weights": (
        "decoder",
        lambda f: (f / "slat_decoder_mesh.pt").write_bytes(pickle.dumps(Bomb(f / "ran"))),
        "not a zip archive",
    ),
    "code in torch's archive": (
        "decoder",
        lambda f: torch.save({"a": Bomb(f / "ran")}, f / "slat_decoder_mesh.pt"),
        "holds 'io open'|holds '_io open'",
    ),
    "no tensors": (
        "structure",
        lambda f: torch.save({"weights": {}}, f / "ss_generator.pt"),
        "expected tensors by name under 'state_dict'",
    ),
    "a missing key": (
        "decoder",
        lambda f: edit_state(f, lambda s: s.pop("out_layer.bias")),
        "out_layer.bias: missing",
    ),
    "a strange key": (
        "decoder",
        lambda f: edit_state(f, lambda s: s.update(extra=torch.ones(1))),
        "extra: unexpected",
    ),
    "another shape": (
        "decoder",
        lambda f: edit_state(f, lambda s: s.update({"out_layer.bias": torch.ones(3)})),
        r"out_layer.bias: expected \(500,\), got \(3,\)",
    ),
    "integers": (
        "decoder",
        lambda f: edit_state(f, lambda s: s.update({"out_layer.bias": s["out_layer.bias"].long()})),
        r"expected floating-point tensors, got \['out_layer.bias'\]",
    ),
}


@pytest.mark.parametrize("case", CORRUPTED)
def test_a_folder_that_does_not_fit_is_refused_and_runs_nothing(own_folder, case):
    part, corrupt, message = CORRUPTED[case]
    corrupt(own_folder)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load_part(own_folder, part)
    assert not (own_folder / "ran").exists()


def test_an_unknown_part_is_refused(folder):
    with pytest.raises(
        ConfigError, match="sam3d_parts: expected some of decoder, slat, structure, got 'x'"
    ):
        load_part(folder, "x")


class Flow(torch.nn.Module):
    """The velocity a · x + b · t of each latent; stores its arguments."""

    def __init__(self, names):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))
        if names:
            self.input_latent_mappings, self.is_shortcut_model = names, True

    def forward(self, x, t, condition, *coords, d=None):
        self.seen = (x, t, condition, coords, d)
        if isinstance(x, dict):
            return {name: self.gain * value for name, value in x.items()}
        return self.gain * x


def test_the_flow_matching_loss_follows_its_equation():
    latents = {"shape": torch.full((2, 3, 4), 5.0), "pose": torch.full((2, 1, 6), -2.0)}
    model = Flow(["shape", "pose"])
    torch.manual_seed(1)
    condition = torch.zeros(2, 7, 8)
    loss = flow_matching_loss(
        model, latents, condition, settings=FlowSettings(sigma_min=0.25, time_scale=10.0)
    )
    x, t, given, coords, d = model.seen
    assert given is condition and coords == () and torch.equal(d, torch.zeros(2))
    assert ((t > 0) & (t < 10)).all() and t[0] != t[1]
    wanted = 0
    for name, end in latents.items():
        at = (t / 10).view(2, 1, 1)
        start = (x[name] - at * end) / (1 - 0.75 * at)  # the noise that it was drawn from
        assert 0.2 < start.std() < 2 and start.abs().max() < 5
        wanted = wanted + (0.5 * x[name] - (end - 0.75 * start)).square().mean()
    assert_follows(loss, wanted)
    loss.backward()
    assert model.gain.grad is not None
    one, voxels = Flow(None), torch.zeros(5, 4, dtype=torch.int32)
    assert flow_matching_loss(one, torch.ones(1, 5, 8), condition[:1], voxels).isfinite()
    assert one.seen[3][0].shape == (5, 4) and one.seen[4] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["shape"], {"pose": torch.ones(1, 2, 3)}, 1, None),
            r"expected \['shape'\], got \['pose'\]",
        ),
        ((None, torch.ones(1, 2, 3), 1, None), "coords: expected the voxels of 'slat'"),
        (
            (["shape"], {"shape": torch.ones(2, 2, 3)}, 1, None),
            r"expected the same number of samples in every input, got \[1, 2\]",
        ),
        (
            (None, torch.ones(2, 2, 3), 2, torch.zeros(2, 4)),
            r"expected one sample in every input, got \[2\]",
        ),
    ],
)
def test_latents_that_are_not_the_models_are_refused(arguments, message):
    names, latents, count, coords = arguments
    with pytest.raises(DataError, match=message):
        flow_matching_loss(Flow(names), latents, torch.zeros(count, 7, 8), coords)
