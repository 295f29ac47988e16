"""The sparse decoder: its computation, invalid input, LoRA, and the packaged weights."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.medical.data.batch import SparseTokens
from fastlora.medical.data.regions import (
    TOKEN_CHANNELS,
    active_cells,
    coarse_segmentation,
    token_features,
)
from fastlora.medical.models.decoder import (
    BASE_WEIGHTS,
    DecoderConfig,
    SparseLinear,
    SparseMeshDecoder,
    load_base_model,
    position_embedding,
    save_base_model,
)
from fastlora.medical.training.checkpointing import model_sha256
from tests.support.paths import ROOT
from tests.support.tolerance import assert_close, assert_moved, assert_same_distances

CONFIG = DecoderConfig(in_channels=70, channels=24, blocks=2, heads=2, context=0, knots=5)


def filled(config: DecoderConfig = CONFIG) -> SparseMeshDecoder:
    """A decoder whose out_layer is not zero."""
    torch.manual_seed(0)
    model = SparseMeshDecoder(config)
    nn.init.normal_(model.out_layer.weight, std=0.1)
    return model


def tokens_of(*counts: int, channels: int = 70) -> tuple[SparseTokens, Tensor]:
    """Random tokens, so many in each sample, and base distances."""
    generator = torch.Generator().manual_seed(1)
    coords = [
        torch.cat([torch.full((n, 1), b), _cells(torch.randperm(512, generator=generator)[:n])], 1)
        for b, n in enumerate(counts)
    ]
    feats = torch.randn(sum(counts), channels, generator=generator)
    return SparseTokens(feats, torch.cat(coords)), torch.randn(
        len(counts), 32, 32, 32, generator=generator
    )


def _cells(flat: Tensor) -> Tensor:
    return torch.stack([flat // 64, flat // 8 % 8, flat % 8], dim=1)


def test_the_residual_is_added_in_its_own_cells() -> None:
    model = filled()
    tokens, base = tokens_of(3, 5)
    with torch.no_grad():
        residual = model(tokens, base) - base
        model.out_layer.weight.zero_()
        model.out_layer.bias.copy_(torch.cat([torch.arange(64.0), torch.zeros(5)]))
        patch = model(tokens, base) - base
    touched = residual.abs().view(2, 8, 4, 8, 4, 8, 4).amax((2, 4, 6)) > 0
    expected = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    expected[tuple(tokens.coords.unbind(1))] = True
    assert torch.equal(touched, expected)
    b, i, j, k = tokens.coords[4].tolist()
    cell = patch[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4]
    assert_same_distances(cell.numpy(), torch.arange(64.0).view(4, 4, 4).numpy())


def test_the_curve_maps_grey_values_to_distances_linearly_between_knots() -> None:
    model = filled()
    knots = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0])
    tokens, base = tokens_of(6)
    with torch.no_grad():
        model.out_layer.weight.zero_()
        model.out_layer.bias.copy_(torch.cat([torch.zeros(64), knots]))
        got = model(tokens, torch.zeros_like(base))
    grey = tokens.feats[3, :64].clamp(-2, 2).numpy()
    expected = np.interp(grey, [-2, -1, 0, 1, 2], knots.numpy())
    _, i, j, k = tokens.coords[3].tolist()
    cell = got[0, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4]
    assert_same_distances(cell.flatten().numpy(), expected)


def test_a_fresh_decoder_gives_the_base_and_only_its_head_has_gradient() -> None:
    model = SparseMeshDecoder(CONFIG)
    tokens, base = tokens_of(4)
    out = model(tokens, base)
    assert torch.equal(out, base)
    out.square().sum().backward()
    assert model.out_layer.weight.grad is not None
    assert model.out_layer.weight.grad.abs().sum() > 0
    assert model.input_layer.weight.grad is not None
    assert model.input_layer.weight.grad.abs().sum() == 0


MATCHING = replace(CONFIG, in_channels=64 + 27, fraction_steps=2)


def ball_tokens(radius: float, base_radius: float) -> tuple[SparseTokens, Tensor, Tensor]:
    """Tokens that state the cell fractions of a ball, distances to a ball of another radius, and the fractions (1, 8, 8, 8)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"), -1)
    away = (grid - torch.tensor([15.0, 16.2, 14.1])).norm(dim=-1)
    inside = (away < radius).numpy()
    coarse = coarse_segmentation(inside)
    cells = active_cells(coarse)
    feats = token_features(np.full((32, 32, 32), 0.5, np.float32), coarse, cells)
    feats = np.concatenate([np.zeros((len(cells), 64), np.float32), feats[:, -27:]], axis=1)
    coords = torch.cat([torch.zeros(len(cells), 1, dtype=torch.int64), torch.tensor(cells)], 1)
    tokens = SparseTokens(torch.tensor(feats), coords)
    return tokens, (away - base_radius).clamp(-4, 4)[None], torch.tensor(coarse)[None]


def fractions(field: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool3d((field < 0).float()[:, None], 4)[:, 0]


@pytest.mark.parametrize("wrong", [-1.0, -0.4, 0.3, 0.8])
def test_the_surface_moves_to_the_fractions_of_the_coarse_segmentation(wrong: float) -> None:
    tokens, base, coarse = ball_tokens(9.0, 9.0 + wrong)
    model = SparseMeshDecoder(MATCHING)  # its out_layer is zero: without steps it returns the base
    with torch.no_grad():
        matched = model(tokens, base)
    partly = (coarse > 0) & (coarse < 1)
    before, after = ((fractions(d) - coarse)[partly].abs().mean() for d in (base, matched))
    assert before > 0.05 and after < 0.02
    volume = [float((d < 0).sum()) for d in (base, matched)]
    wanted = float(coarse.sum() * 64)
    errors = [abs(one - wanted) for one in volume]
    assert errors[1] < 0.03 * wanted and errors[1] < errors[0] / 3
    assert float((matched - base).abs().max()) <= 2.0  # a voxel a step
    assert torch.equal(SparseMeshDecoder(replace(MATCHING, fraction_steps=0))(tokens, base), base)


def test_a_field_that_has_the_fractions_stays() -> None:
    tokens, base, _ = ball_tokens(9.0, 9.0)
    with torch.no_grad():
        moved = SparseMeshDecoder(MATCHING)(tokens, base) - base
    assert moved.abs().max() < 0.25


def test_matching_has_the_gradient_of_its_own_formula() -> None:
    tokens, base, _ = ball_tokens(9.0, 9.5)
    model = SparseMeshDecoder(MATCHING).double()
    tokens = tokens.replace(tokens.feats.double())
    base = base.double().requires_grad_()
    direction = torch.randn(base.shape, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)).double()
    (model(tokens, base) * weight).sum().backward()
    step = 1e-6
    with torch.no_grad():
        ends = [(model(tokens, base + sign * step * direction) * weight).sum() for sign in (1, -1)]
    assert float((base.grad * direction).sum()) == pytest.approx(
        float(ends[0] - ends[1]) / (2 * step), rel=1e-5
    )


def test_models_of_equal_weights_with_and_without_matching_are_told_apart() -> None:
    with_, without = (
        SparseMeshDecoder(MATCHING),
        SparseMeshDecoder(replace(MATCHING, fraction_steps=0)),
    )
    without.load_state_dict(with_.state_dict())
    assert model_sha256(with_) != model_sha256(without)
    other = SparseMeshDecoder(replace(MATCHING, fraction_steps=0))
    other.load_state_dict(without.state_dict())
    assert model_sha256(other) == model_sha256(without)


def test_samples_do_not_see_each_other_whatever_their_lengths() -> None:
    model = filled()
    tokens, base = tokens_of(7, 0, 20)
    with torch.no_grad():
        together = model(tokens, base)
        for n in range(3):
            own = tokens.coords[:, 0] == n
            coords = tokens.coords[own].clone()
            coords[:, 0] = 0
            alone = model(SparseTokens(tokens.feats[own], coords), base[n : n + 1])
            wide = SparseTokens(tokens.feats[own].double(), coords)
            exact = copy.deepcopy(model).double()(wide, base[n : n + 1].double())
            assert_close(together[n : n + 1], alone, exact)


def test_tokens_of_a_sample_do_see_each_other_and_where_they_are() -> None:
    model = filled()
    tokens, base = tokens_of(6)
    changed = tokens.feats.clone()
    changed[0] += 1
    moved = tokens.coords.clone()
    moved[:, 1:] = (moved[:, 1:] + 1) % 8
    with torch.no_grad():
        first = model(tokens, base) - base
        other = model(tokens.replace(changed), base) - base
        shifted = model(SparseTokens(tokens.feats, moved), base) - base
    _, i, j, k = (4 * tokens.coords[5]).tolist()
    at = (0, slice(i, i + 4), slice(j, j + 4), slice(k, k + 4))
    assert not torch.allclose(first[at], other[at])
    assert not torch.allclose(first.sum(), shifted.sum())


def test_position_embedding_tells_all_cells_apart() -> None:
    cells = torch.cartesian_prod(*3 * [torch.arange(8)])
    embedded = position_embedding(cells, 32)
    assert embedded.shape == (512, 32)
    assert (embedded[:, 30:] == 0).all()
    assert torch.cdist(embedded, embedded).fill_diagonal_(9).min() > 0.1


def test_module_names_and_token_convention_are_sam3d_s() -> None:
    model = filled()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    block = {"attn.to_qkv", "attn.to_out", "mlp.mlp.0", "mlp.mlp.2"}
    expected = {f"blocks.{n}.{part}" for n in range(2) for part in block}
    assert linears == expected | {"input_layer", "out_layer"}
    layer = SparseLinear(70, 3)
    tokens, _ = tokens_of(4)
    out = layer(tokens)
    assert out.coords is tokens.coords
    torch.testing.assert_close(
        out.feats, nn.functional.linear(tokens.feats, layer.weight, layer.bias)
    )


def test_lora_wraps_each_block_trains_and_merges_to_the_same() -> None:
    model = filled()
    tokens, base = tokens_of(9, 4)
    before = model(tokens, base).detach()
    counts = fastlora.setup_lora_for_medical_finetuning(model, rank=2, include_ffn=True)
    assert sum(1 for _ in fastlora.named_lora_layers(model)) == 8
    assert counts["trainable"] == counts["lora"] + (24 + 1) * (64 + 5)
    torch.testing.assert_close(model(tokens, base), before)
    generator = torch.Generator().manual_seed(2)
    for parameter in fastlora.get_trainable_params(model):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted = model(tokens, base)
    adapted.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name
    assert_moved(adapted, before)
    exact = copy.deepcopy(model).double()(tokens.replace(tokens.feats.double()), base.double())
    assert_close(fastlora.merged_model(model)(tokens, base), adapted, exact)


def test_invalid_inputs_are_named() -> None:
    model = filled()
    tokens, base = tokens_of(3, 2)
    with pytest.raises(DataError, match=r"tokens\.feats: expected \(T, 70\), got \(5, 69\)"):
        model(tokens.replace(tokens.feats[:, :69]), base)
    with pytest.raises(
        DataError, match=r"base_vox: expected \(B, 32, 32, 32\), got \(2, 32, 32, 31\)"
    ):
        model(tokens, base[..., :31])
    with pytest.raises(
        DataError, match=r"tokens\.coords: expected \[sample, i, j, k\] below \[1, 8, 8, 8\]"
    ):
        model(tokens, base[:1])
    with pytest.raises(DataError, match="ascending"):
        model(SparseTokens(tokens.feats.flip(0), tokens.coords.flip(0)), base)
    with pytest.raises(DataError, match=r"coords: expected \(5, 4\), got \(5, 3\)"):
        SparseTokens(tokens.feats, tokens.coords[:, 1:])
    with pytest.raises(DataError, match=r"feats: expected \(T, C\), got \(5,\)"):
        tokens.replace(tokens.feats[:, 0])
    none = SparseTokens(tokens.feats[:0], tokens.coords[:0])
    out = model(none, base)
    assert torch.equal(out, base)
    out.sum().backward()  # as a process without tokens has to
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_invalid_configurations_are_named() -> None:
    with pytest.raises(ConfigError, match=r"heads: expected a divisor of channels=24, got 5"):
        replace(CONFIG, heads=5)
    with pytest.raises(ConfigError, match=r"blocks: expected an int >= 1, got 0"):
        replace(CONFIG, blocks=0)
    with pytest.raises(ConfigError, match=r"channels: expected an int >= 6, got 4"):
        replace(CONFIG, channels=4, heads=1)
    with pytest.raises(
        ConfigError, match=r"in_channels: expected at least the image patch's 6³ = 216, got 70"
    ):
        replace(CONFIG, context=1)
    with pytest.raises(ConfigError, match=r"knots: expected an int >= 2, got 1"):
        replace(CONFIG, knots=1)
    with pytest.raises(ConfigError, match=r"fraction_steps: expected an int >= 0, got -1"):
        replace(CONFIG, fraction_steps=-1)
    with pytest.raises(ConfigError, match=r"4³ and 3³ coarse values = 91, got 70"):
        replace(CONFIG, fraction_steps=1)


def test_saved_weights_come_back_and_damage_is_found(tmp_path: Path) -> None:
    model = filled()
    path = tmp_path / "weights" / "small.safetensors"
    save_base_model(model, path, {"seed": 3})
    loaded = load_base_model(path)
    tokens, base = tokens_of(5)
    assert torch.equal(loaded(tokens, base), model(tokens, base))
    assert loaded.config == CONFIG
    card_path = path.with_suffix(".json")
    card = json.loads(card_path.read_text())
    assert card["seed"] == 3

    card_path.write_text(json.dumps({**card, "config": {**card["config"], "blocks": 3}}))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_base_model(path)
    for config in ({**card["config"], "depth": 2}, {}, [1], None):
        card_path.write_text(json.dumps({**card, "config": config}))
        with pytest.raises(CheckpointError, match="is not a model card"):
            load_base_model(path)
    card_path.write_text(json.dumps(card))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"expected {card['sha256']}"):
        load_base_model(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no file"):
        load_base_model(path)


def test_the_packaged_base_is_pretrained_and_small() -> None:
    model = load_base_model()
    card = json.loads(BASE_WEIGHTS.with_suffix(".json").read_text())
    assert model.config.in_channels == TOKEN_CHANNELS and model.config.fraction_steps == 2
    assert model.out_layer.weight.abs().sum() > 0
    assert BASE_WEIGHTS.stat().st_size < 4_000_000
    assert "no anatomy" in card["trained_on"]
    assert card["command"].startswith("python scripts/pretrain_base.py")


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)  # the loader's worker
def test_pretraining_is_reproducible_and_refuses_invalid_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "scripts" / "pretrain_base.py"
    spec = importlib.util.spec_from_file_location("pretrain_base", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = ["--steps", "3", "--batch_size", "1", "--channels", "24", "--blocks", "1"]
    hashes = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        path = tmp_path / f"{name}.safetensors"
        assert module.main([*small, "--seed", seed, "--output", str(path)]) == 0
        assert load_base_model(path).out_layer.weight.abs().sum() > 0
        assert load_base_model(path).config.fraction_steps == 2
        hashes.append(json.loads(path.with_suffix(".json").read_text())["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert module.main(["--steps", "0", "--output", str(tmp_path / "d.safetensors")]) == 2
    assert "steps: expected > 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "d.safetensors").exists()
