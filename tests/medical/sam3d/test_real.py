"""SAM 3D Objects' real modules with random weights, on a CPU. docs/sam3d.md has the command; skipped without a checkout."""

import contextlib
import importlib
import io
import os
import sys

import numpy as np
import pytest
import torch

import fastlora
from fastlora.config import DEFAULT_TARGETS
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.sam3d.generator import flow_matching_loss
from fastlora.medical.sam3d.loading import FlowSettings, load_part, sparse_tensor
from fastlora.medical.sam3d.options import Sam3dOptions
from fastlora.medical.sam3d.surface import surface_losses
from fastlora.medical.scans.geometry import mesh_from_sdf
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.finetuned import load_finetuned, predict
from fastlora.medical.training.trainer import MedicalTrainer
from tests.support import sam3d_standins
from tests.support.processes import run_processes
from tests.support.sam3d_folder import CONFIGS, MODELS, TARGETS, fill, write_folder
from tests.support.tiny_run import TinyRegions
from tests.support.tolerance import assert_close, assert_differs

CHECKOUT = os.environ.get("FASTLORA_SAM3D")
if CHECKOUT is None:
    pytest.skip(
        "FASTLORA_SAM3D does not name a checkout of SAM 3D Objects", allow_module_level=True
    )
# Warnings of the package and of what it imports are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def make_importable():
    """The checkout on the path, with the stand-ins for spconv and kaolin."""
    sys.path.insert(0, CHECKOUT)
    sam3d_standins.install()


@pytest.fixture(scope="module", autouse=True)
def package():
    """The package importable, and the environment that the loader sets."""
    make_importable()
    sparse_tensor()


def build(part, config, zeros=False):
    """An instance of a part's class with seeded weights; zeros: keep those that are initialised to zero."""
    if part == "structure":
        latents = importlib.import_module(f"{MODELS}.mm_latent")
        mapping = {}
        for name, about in config["latent_mapping"].items():
            embedder = dict(about["pos_embedder"])
            make = getattr(latents, embedder.pop("_target_").rpartition(".")[2])
            mapping[name] = latents.Latent(8, 64, make(**embedder))
        config = {**config, "latent_mapping": mapping}
    module, _, name = TARGETS[part].rpartition(".")
    torch.manual_seed(5)
    device = {"device": "cpu"} if part == "decoder" else {}
    model = getattr(importlib.import_module(module), name)(**config, **device)
    if not zeros:
        fill(model)
    return model


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sam3d") / "checkpoints", build)


def adapted(folder, part, seed=1):
    """A part with adapters whose lora_B is filled."""
    model = load_part(folder, part)
    torch.manual_seed(seed)
    config = fastlora.LoRAConfig(
        [
            name
            for name in (*DEFAULT_TARGETS, "mlp")
            if part != "decoder" or name not in ("to_q", "to_kv")
        ],
        rank=2,
    )
    fastlora.inject_lora(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def voxels(resolution):
    """A hollow ball in each of two samples, (T, 4) int32."""
    axis = torch.arange(resolution)
    cells = torch.cartesian_prod(axis, axis, axis)
    radius = (cells + 0.5 - resolution / 2).norm(dim=1)
    shell = cells[(radius > resolution / 4) & (radius < resolution / 2.2)].int()
    zeros = torch.zeros(len(shell), 1, dtype=torch.int32)
    return torch.cat([torch.cat([zeros, shell], 1), torch.cat([zeros + 1, shell], 1)])


def outputs(part, model, dtype=torch.float32):
    """The outputs of the part's networks for seeded inputs; for the decoder the features of its mesh."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if part == "decoder":
        coords = voxels(model.resolution)
        model.to_representation = lambda features: features
        return {"features": model(sparse_tensor()(feats=draw(len(coords), 8), coords=coords)).feats}
    time, condition = torch.tensor([300.0, 700.0]), draw(2, 11, 48)
    if part == "slat":
        coords = voxels(16)
        return {"flow": model(draw(1, len(coords), 8), time, condition, coords.numpy())}
    latents = {"shape": draw(2, 64, 8), "pose": draw(2, 4, 8)}
    return model(latents, time, condition, d=torch.tensor([10.0, 20.0]))


@pytest.mark.parametrize(("part", "count"), [("decoder", 8), ("slat", 23), ("structure", 32)])
def test_adapters_are_in_the_expected_layers_and_get_gradients(folder, part, count):
    model = adapted(folder, part)
    layers = list(fastlora.named_lora_layers(model))
    assert len(layers) == count
    fastlora.freeze_base_params(model)
    sum(value.square().mean() for value in outputs(part, model).values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * count
    assert all(g is not None and torch.isfinite(g).all() and g.any() for g in gradients.values())


def test_a_decoder_of_the_released_size_takes_48_adapters():
    model = build(
        "decoder", {**CONFIGS["decoder"], "model_channels": 768, "num_blocks": 12, "num_heads": 12}, zeros=True
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 90_926_693
    assert fastlora.inject_lora(model, ["to_qkv", "to_out", "mlp"], rank=8) == 48
    assert fastlora.count_parameters(model)["lora"] == 1_179_648


def test_a_decoder_with_zero_outputs_gives_adapters_no_gradient(tmp_path):
    write_folder(tmp_path / "zeros", lambda p, c: build(p, c, zeros=True), ("decoder",))
    model = adapted(tmp_path / "zeros", "decoder")
    fastlora.freeze_base_params(model)
    features = outputs("decoder", model)["features"]
    (features - 1).square().mean().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_wrapped_layer_returns_what_it_is_given(folder):
    model, seen = adapted(folder, "decoder"), {}
    for path in ("blocks.0.mlp.mlp.0", "blocks.0.attn.to_qkv"):
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: seen.update({path: (type(args[0]), type(out))})
        )
    outputs("decoder", model)
    assert seen["blocks.0.mlp.mlp.0"] == (sparse_tensor(), sparse_tensor())
    assert seen["blocks.0.attn.to_qkv"] == (torch.Tensor, torch.Tensor)


@pytest.fixture
def in_float64(monkeypatch):
    """Makes the package compute in float64 where it always uses float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(sparse_tensor(), "float", lambda self: self.replace(self.feats.double()))


@pytest.mark.parametrize("part", ["decoder", "slat", "structure"])
@torch.no_grad()
def test_adapters_are_saved_loaded_and_merged(folder, part, tmp_path, request):
    model = adapted(folder, part)
    wanted = outputs(part, model)
    fastlora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = adapted(folder, part, seed=2)
    assert_differs(next(iter(outputs(part, other).values())), next(iter(wanted.values())))
    fastlora.load_adapter(other, tmp_path / "adapter.safetensors")
    assert all(torch.equal(a, wanted[name]) for name, a in outputs(part, other).items())
    merged = fastlora.merged_model(model)
    assert not list(fastlora.named_lora_layers(merged))
    got = outputs(part, merged)
    request.getfixturevalue("in_float64")
    reference = model.double()
    reference.dtype = torch.float64
    exact = outputs(part, reference, torch.float64)
    for name in wanted:
        assert_close(got[name], wanted[name], exact[name], f"{part} {name}")


def latents_of(part):
    """Cached latents, conditioning and voxels of one sample, or of two."""
    torch.manual_seed(9)
    if part == "slat":
        coords = voxels(16)
        coords = coords[coords[:, 0] == 0]
        return torch.randn(1, len(coords), 8), torch.randn(1, 11, 48), coords
    return (
        {"shape": torch.randn(2, 64, 8), "pose": torch.randn(2, 4, 8)},
        torch.randn(2, 11, 48),
        None,
    )


@pytest.mark.parametrize("part", ["slat", "structure"])
def test_the_flow_matching_loss_is_the_packages_own(folder, part):
    from sam3d_objects.model.backbone.generator.flow_matching.model import FlowMatching

    model = adapted(folder, part)
    latents, condition, coords = latents_of(part)
    more = [] if coords is None else [coords.numpy()]
    zeros = {"d": torch.zeros(2)} if part == "structure" else {}
    weights = {"shape": 1.0, "pose": 1.0} if part == "structure" else 1.0
    square = torch.nn.functional.mse_loss
    theirs = FlowMatching(
        model,
        sigma_min=0.1,
        time_scale=500.0,
        loss_weights=weights,
        loss_fn=dict.fromkeys(weights, square) if part == "structure" else square,
    )
    torch.manual_seed(11)
    wanted, _ = theirs.loss(latents, condition, *more, **zeros)
    torch.manual_seed(11)
    got = flow_matching_loss(model, latents, condition, coords, FlowSettings(0.1, 500.0))
    assert torch.equal(got, wanted)


class CachedLatents(TinyRegions):
    """Regions with seeded latents and conditions of a generator."""

    def __init__(self, size, seed, part):
        super().__init__(size, seed)
        self.part = part

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        sample = {**super().__getitem__(index), "condition": torch.randn(11, 48, generator=draw)}
        if self.part == "structure":
            shapes = {"shape": (64, 8), "pose": (4, 8)}
            latents = {n: torch.randn(shape, generator=draw) for n, shape in shapes.items()}
            return {**sample, "latents": latents}
        coords = voxels(16)
        coords = coords[coords[:, 0] == 0, 1:].long()
        feats = torch.randn(len(coords), 8, generator=draw)
        return {**sample, "slat_coords": coords, "slat_feats": feats}


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("part", ["slat", "structure"])
def test_a_generator_learns_from_cached_latents(folder, part, finetune, tmp_path):
    values = {"model": "sam3d", "sam3d_dir": str(folder), "sam3d_part": part, "latents_dir": "none"}
    config = TrainConfig(
        **values, finetune=finetune, augment=False, epochs=15, batch_size=2, lora_rank=4, lora_alpha=8.0,
        lr=1e-2 if finetune == "lora" else 1e-3, sam3d_checkpointing=True, checkpoint_dir=str(tmp_path / "run"),
        progress=False,
    )  # fmt: skip
    data = CachedLatents(2, 0, part)
    trainer = MedicalTrainer(config, None, data, data)
    with contextlib.redirect_stdout(io.StringIO()):
        losses = [record["val"]["total"] for record in trainer.train()]
    print(part, finetune, round(losses[0], 3), round(losses[-1], 3))
    assert (
        losses[-1] < 0.97 * losses[0]
    )  # with LoRA through a frozen output layer of random weights
    state = {id(p) for p in trainer.state.optimizer.state}
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    reached = [n for n, p in trainer.model.named_parameters() if id(p) in state]
    assert reached == trained  # every one had a gradient


def regions(count=2):
    data = TinyRegions(count, 0)
    return collate_regions([data[index] for index in range(count)])


def losses_of(model, batch):
    torch.manual_seed(3)
    return surface_losses(model(*model.inputs(batch)), batch)


def ready(folder, **options):
    torch.manual_seed(4)
    model = Sam3dOptions(sam3d_dir=folder, **options).load(None)
    model.adapt(2, 4.0, 0.1, True, {})
    return model.train()


def test_every_loss_reaches_every_adapter_and_the_encoder(folder):
    batch, model = regions(), ready(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    losses = losses_of(model, batch)
    assert losses["empty"] == 0
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in ("sdf", "vertex", "chamfer", "regularisation"):
        gradients = torch.autograd.grad(losses[name], trained, retain_graph=True)
        assert all(torch.isfinite(g).all() for g in gradients), name
        assert sum(bool(g.any()) for g in gradients) == len(gradients), name


def test_full_fine_tuning_reaches_every_weight(folder):
    model = Sam3dOptions(sam3d_dir=folder).load(None).requires_grad_(True).train()
    losses_of(model, regions())["total"].backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unreached


def train_briefly(folder, run, kind):
    """Two epochs over three ellipsoids in one of several processes, or in one; returns the losses."""
    if "spconv" not in sys.modules:  # in a child process
        make_importable()
    values = {"model": "sam3d", "sam3d_dir": str(folder), "checkpoint_dir": str(run), "epochs": 2}
    config = TrainConfig(**values, batch_size=2, lr=1e-6, parallel=kind, progress=False)
    trainer = MedicalTrainer(config, None, TinyRegions(3, 0), TinyRegions(1, 0))
    with contextlib.redirect_stdout(io.StringIO()):
        history = trainer.train()
    return [[r.get("train", {}).get("total", 0), r["val"]["total"]] for r in history]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(folder, tmp_path, kind):
    alone = train_briefly(folder, tmp_path / "one", "ddp")
    results = run_processes(2, train_briefly, folder, tmp_path / "two", kind)
    assert results[0] == results[1]
    for got, wanted in zip(results[0], alone, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_checkpointing_gives_the_same_gradients_bit_for_bit(folder):
    found = []
    for checkpointing in (False, True):
        model = ready(folder, sam3d_checkpointing=checkpointing)
        losses_of(model, regions())["total"].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 16 + 6
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_torso_of_16_bits_is_near_that_of_32(folder):
    batch = regions()
    half, full = ready(folder, sam3d_torso="fp16").eval(), ready(folder).eval()
    assert half.decoder.blocks[0].attn.to_qkv.original_linear.weight.dtype == torch.float16
    with torch.no_grad():
        fields = [predict(model, batch) for model in (half, full)]
    assert (fields[0] - fields[1]).abs().mean() < 0.02
    losses_of(half, batch)["total"].backward()
    gradients = [p.grad for p in half.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in gradients) and gradients[-1].any()


def test_training_on_regions_lowers_the_loss_and_gives_a_mesh(folder, tmp_path):
    config = TrainConfig(
        model="sam3d",
        sam3d_dir=str(folder),
        checkpoint_dir=str(tmp_path / "run"),
        epochs=40,
        batch_size=2,
        lr=2e-3,
        lora_rank=4,
        lora_alpha=8.0,
        progress=False,
    )
    trainer = MedicalTrainer(config, None, TinyRegions(2, 0), TinyRegions(1, 0))
    with contextlib.redirect_stdout(io.StringIO()):
        history = trainer.train()
    print([round(record["val"]["total"], 3) for record in history])
    print([round(record["val"]["dice"], 3) for record in history])
    first, last = history[0]["val"], history[-1]["val"]
    for name in ("total", "sdf", "vertex", "chamfer", "normal"):
        assert last[name] < 0.4 * first[name], name
    assert last["dice"] > 0.8 > first["dice"]
    batch = regions(1)
    with torch.inference_mode():
        plain, merged = (
            predict(load_finetuned(tmp_path / "run", merged, "last"), batch)
            for merged in (False, True)
        )
    assert (plain - merged).abs().max() < 1e-3
    mesh = mesh_from_sdf(plain[0].numpy(), batch.affine[0].numpy())
    centre = np.argwhere(batch.sdf_vox[0].numpy() < 0).mean(0)
    assert mesh.is_watertight and np.abs(mesh.bounds.mean(0) - centre).max() < 6
