"""Whole models through the kernels against the torch path: kinds of adapters, layers and training, on a GPU in bfloat16.

Without a GPU Triton's interpreter runs the kernels, in float32 and under autocast in 16 bits.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoRAConfig, LoRALinear
from tests.support.models import Decoder
from tests.support.tolerance import assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
WIDTH = 256 if GPU else 32
TARGETS = ["*.to_qkv", "*.to_out", "*.mlp.0", "*.mlp.2"]


def _adapted(
    backend: str, dtype: torch.dtype = DTYPE, dropout: float = 0.0, **options: Any
) -> nn.Module:
    """The same adapted decoder whatever the backend and the dtype, its lora_B not zero, on the device."""
    torch.manual_seed(3)
    model = Decoder(WIDTH).to(DTYPE)
    config = LoRAConfig(TARGETS, 8, 16.0, dropout, match="glob", **options)
    assert fastlora.inject_lora(model, config) == 8
    fastlora.freeze_base_params(model)
    generator = torch.Generator().manual_seed(4)
    for layer in filter(lambda module: isinstance(module, LoRALinear), model.modules()):
        layer.backend = backend
        values = torch.randn(layer.lora_B.shape, generator=generator) / 16
        layer.lora_B.data += values.to(DTYPE)
    return model.to(dtype).to(DEVICE)


def _input(dtype: torch.dtype = DTYPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 40, 8, generator=generator).to(DTYPE).to(dtype).to(DEVICE)


def _step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of its mean square."""
    model.zero_grad(set_to_none=True)
    y = model(x)
    y.double().square().mean().backward()
    found = {"y": y.detach()}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _same(got, want, exact) -> None:
    assert got.keys() == want.keys() == exact.keys() and len(got) > 8
    for name, value in got.items():
        assert_close(value, want[name], exact[name], name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"adapter_dtype": torch.float32},
        {"rank_pattern": {"*.to_qkv": 40}},
    ],
    ids=str,
)
def test_a_model_computes_what_the_torch_path_computes(options):
    got = _step(_adapted("triton", **options), _input())
    want = _step(_adapted("torch", **options), _input())
    exact_options = options | (
        {"adapter_dtype": torch.float64} if "adapter_dtype" in options else {}
    )
    exact = _adapted("torch", torch.float64, **exact_options).double()
    _same(got, want, _step(exact, _input(torch.float64)))


@pytest.mark.slow
def test_checkpointed_blocks_draw_the_same_masks():
    model = _adapted("triton", dropout=0.3)
    x = _input()

    def run(recompute: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        model.zero_grad(set_to_none=True)
        h = model.input_layer(x)
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
        h.double().square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, recomputed = run(False), run(True)
    assert plain.keys() == recomputed.keys() and len(plain) == 16
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_runs_the_kernels_in_its_dtype(dtype, bfloat16):
    model = _adapted("triton", torch.float32)
    assert "triton" in str(
        fastlora.explain(model.blocks[0].attn.to_qkv, torch.zeros(80, WIDTH, device=DEVICE))
    )
    with torch.autocast(DEVICE, dtype):
        y = model(_input(torch.float32))
    y.float().square().mean().backward()
    with torch.autocast(DEVICE, dtype):
        plain = _adapted("torch", torch.float32)(_input(torch.float32))
    exact = _adapted("torch", torch.float64)(_input(torch.float64))
    assert_close(y.detach(), plain.detach(), exact.detach())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.slow
def test_training_converges_as_on_the_torch_path():
    losses = {}
    for backend in ("triton", "torch"):
        model, x = _adapted(backend), _input()
        target = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(9)).to(DEVICE)
        optimizer = torch.optim.AdamW(fastlora.get_trainable_params(model), lr=1e-3)
        losses[backend] = []
        for _ in range(20):
            loss = F.mse_loss(model(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    first, last = losses["triton"][0], losses["triton"][-1]
    assert last < 0.9 * first
    for one, other in zip(losses["triton"], losses["torch"], strict=True):
        assert abs(one - other) < 0.03 * first


@pytest.mark.slow
def test_saved_adapters_and_merged_weights_agree(tmp_path):
    model, x = _adapted("triton"), _input()
    before = _step(model, x)
    exact = _step(_adapted("torch", torch.float64), _input(torch.float64))
    plain = _step(_adapted("torch"), x)
    fastlora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = _adapted("triton")
    for parameter in fastlora.get_lora_params(other):
        parameter.data.zero_()
    fastlora.load_adapter(other, tmp_path / "adapter.safetensors")
    for name, value in _step(other, x).items():
        assert torch.equal(value, before[name]), name
    merged = copy.deepcopy(model)
    fastlora.merge_lora_weights(merged)
    assert_close(merged(x), plain["y"], exact["y"])


@pytest.mark.slow
@pytest.mark.skipif(not GPU, reason="needs inductor's kernels")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_compiled_model_computes_what_the_eager_one_does(dropout):
    model, x = _adapted("triton", dropout=dropout).train(dropout > 0), _input()
    torch.manual_seed(1)
    want = _step(model, x)
    torch.compiler.reset()
    compiled = torch.compile(model)
    torch.manual_seed(1)
    got = _step(compiled, x)
    got = {name.removeprefix("_orig_mod."): value for name, value in got.items()}
    assert got.keys() == want.keys()
    if dropout == 0:
        exact = _step(_adapted("torch", torch.float64), _input(torch.float64))
        _same(got, want, exact)


@pytest.mark.slow
@pytest.mark.skipif(not GPU, reason="CUDA graphs")
def test_a_captured_training_step_equals_the_eager_one():
    losses = []
    for captured in (False, True):
        model, x = _adapted("triton"), _input()
        parameters = fastlora.get_trainable_params(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, capturable=True)

        def step(model=model, x=x, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = step
        if captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()

            def run(graph=graph, loss=loss):
                graph.replay()
                return loss

        else:
            for _ in range(3):
                step()
        losses.append([run().item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
