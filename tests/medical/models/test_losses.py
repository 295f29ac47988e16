"""Every loss term has a gradient, is smallest at the ground truth, and weights regions equally."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora.errors import ConfigError, DataError
from fastlora.medical.data.grids import TRUNCATION_VOX
from fastlora.medical.models.losses import mesh_losses
from fastlora.medical.training.config import TrainConfig

TERMS = ("sdf", "occupancy", "normal")


def ball(radius: float, shift: float = 0.0, size: int = 16) -> Tensor:
    axis = np.arange(size) - (size - 1) / 2
    x, y, z = np.meshgrid(axis - shift, axis, axis, indexing="ij")
    distance = np.sqrt(x**2 + y**2 + z**2) - radius
    return torch.from_numpy(np.clip(distance, -TRUNCATION_VOX, TRUNCATION_VOX)).float()


def batch(*truths: Tensor) -> Any:
    return SimpleNamespace(
        sdf_vox=torch.stack(truths), meta=[{"region": f"r{n}"} for n in range(len(truths))]
    )


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_has_gradient_near_the_surface(term: str) -> None:
    pred = ball(4.0, shift=1.0)[None].requires_grad_()
    weights = {t: float(t == term) for t in TERMS}
    losses = mesh_losses(pred, batch(ball(5.0)), weights)
    assert losses["total"].item() == pytest.approx(losses[term].item())
    losses["total"].backward()
    assert pred.grad is not None
    assert torch.count_nonzero(pred.grad) > 100


@pytest.mark.parametrize("term", TERMS)
def test_the_ground_truth_is_a_minimum_of_each_term(term: str) -> None:
    truth = ball(5.0)
    at_truth = mesh_losses(truth[None], batch(truth))[term]
    generator = torch.Generator().manual_seed(0)
    for size in (0.05, 0.5, 2.0):
        noise = size * torch.randn(truth.shape, generator=generator)
        assert mesh_losses((truth + noise)[None], batch(truth))[term] > at_truth
    if term != "occupancy":
        assert at_truth == 0


@pytest.mark.parametrize("term", TERMS)
def test_following_the_gradient_of_a_term_alone_lowers_it(term: str) -> None:
    truth = ball(5.0)
    start = ball(4.0, shift=1.0)
    pred = start[None].clone().requires_grad_()
    optimizer = torch.optim.Adam([pred], lr=0.05)
    weights = {t: float(t == term) for t in TERMS}
    first = mesh_losses(pred, batch(truth))[term].item()
    least = mesh_losses(truth[None], batch(truth))[term].item()
    for _ in range(60):
        optimizer.zero_grad()
        mesh_losses(pred, batch(truth), weights)["total"].backward()
        optimizer.step()
    assert mesh_losses(pred, batch(truth))[term].item() - least < 0.5 * (first - least)


def test_far_beyond_the_truncation_is_not_an_error_but_the_wrong_side_is() -> None:
    truth = ball(5.0)
    far = torch.where(truth.abs() < TRUNCATION_VOX, truth, 3 * truth)
    assert mesh_losses(far[None], batch(truth))["sdf"] == 0
    flipped = torch.where(truth < TRUNCATION_VOX, truth, -truth).requires_grad_()
    loss = mesh_losses(flipped[None], batch(truth))["sdf"]
    loss.backward()
    assert loss > 0
    assert flipped.grad is not None
    assert (flipped.grad[truth == TRUNCATION_VOX] < 0).all()


def test_the_weights_make_the_total_and_regions_weigh_alike() -> None:
    truths, preds = (ball(2.5), ball(7.0)), (ball(3.5), ball(6.0))
    weights = {"sdf": 2.0, "occupancy": 0.5, "normal": 0.25}
    both = mesh_losses(torch.stack(preds), batch(*truths), weights)
    single = [mesh_losses(p[None], batch(t), weights) for p, t in zip(preds, truths, strict=True)]
    for name in (*TERMS, "total"):
        expected = torch.stack([losses[name] for losses in single]).mean()
        torch.testing.assert_close(both[name], expected)
    total = 2.0 * both["sdf"] + 0.5 * both["occupancy"] + 0.25 * both["normal"]
    torch.testing.assert_close(both["total"], total)


def test_invalid_weights_shapes_and_regions_without_surface_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss_normal: expected >= 0, got -1"):
        TrainConfig(loss_normal=-1)
    with pytest.raises(ConfigError, match=r"loss_sdf: expected a finite number"):
        TrainConfig(loss_sdf=float("nan"))
    with pytest.raises(ConfigError, match="loss_sdf, .*: expected at least one positive weight"):
        TrainConfig(loss_sdf=0, loss_occupancy=0, loss_normal=0)
    with pytest.raises(
        DataError, match=r"pred_vox: expected \(1, 16, 16, 16\), got \(1, 16, 16, 8\)"
    ):
        mesh_losses(torch.zeros(1, 16, 16, 8), batch(ball(5.0)))
    empty = torch.full((16, 16, 16), TRUNCATION_VOX)
    with pytest.raises(DataError, match=r"expected a surface in each region, got none in .*r1"):
        mesh_losses(torch.zeros(2, 16, 16, 16), batch(ball(5.0), empty))
