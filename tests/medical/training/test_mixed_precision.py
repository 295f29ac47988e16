"""Mixed precision: a run on the CPU with autocast forced on, and the kernels in a step of the packaged decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.medical.data.batch import collate_regions
from fastlora.medical.training import distributed
from fastlora.medical.training.config import TrainConfig
from fastlora.medical.training.finetuned import load_base, make_trainable, trainable_parameters
from tests.support.tiny_run import TinyRegions, tiny_trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_run_computes_in_16_bits_and_resumes(
    amp: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag is refused on a CPU because it is slow there, not because it could not run."""
    monkeypatch.setattr(distributed, "resolve_device", lambda config: torch.device("cpu"))
    run = tiny_trainer(tmp_path / "run", amp=amp)
    seen: set[torch.dtype] = set()
    names = set()
    for name, layer in fastlora.named_lora_layers(run.model):

        def note(_: Any, inputs: Any, output: Any, name: str = name) -> None:
            names.add(name)
            seen.add(output.dtype if isinstance(output, Tensor) else output.feats.dtype)

        layer.register_forward_hook(note)
    run.train()
    assert seen == {dtype} and len(names) == 4
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.state.scaler.is_enabled() == (amp == "fp16")
    exact = tiny_trainer(tmp_path / "exact")
    exact.train()
    for entry, expected in zip(run.history, exact.history, strict=True):
        assert entry["val"]["total"] == pytest.approx(expected["val"]["total"], rel=5e-3)
    assert run.history != exact.history

    first = tiny_trainer(tmp_path / "run", amp=amp, epochs=5, resume="auto")
    assert first.state.scaler.state_dict() == run.state.scaler.state_dict()
    assert len(first.train()) == 6


def step(backend: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The distances and the gradients of the packaged decoder with adapters, computed by `backend` in autocast to `dtype`."""
    torch.manual_seed(0)
    config = TrainConfig()
    model = load_base(config)
    make_trainable(model, config)
    with torch.no_grad():
        for parameter in fastlora.get_lora_params(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.to(DEVICE)
    for _, layer in fastlora.named_lora_layers(model):
        layer.backend = backend
    regions = TinyRegions(2, 0)
    batch = collate_regions([regions[0], regions[1]]).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
        output = model(*model.inputs(batch))
    model.losses(output, batch, config.loss_weights)["total"].backward()
    gradients = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
    return output.detach(), gradients


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernels_compute_a_step_of_the_decoder(dtype: torch.dtype) -> None:
    """As close to float32 as torch in the same autocast is."""
    exact, exact_gradients = step("torch", torch.float32)
    plain, plain_gradients = step("torch", dtype)
    found, gradients = step("triton", dtype)
    assert not torch.equal(found, plain)  # the kernels did run
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert len(gradients) == len(exact_gradients) > 30
    for mine, other, wanted in zip(gradients, plain_gradients, exact_gradients, strict=True):
        allowed = 2 * (other - wanted).norm() + torch.finfo(dtype).eps * wanted.norm()
        assert (mine - wanted).norm() <= allowed
