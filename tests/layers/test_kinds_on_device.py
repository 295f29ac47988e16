"""Every kind of layer, banks of experts and gated MLPs on a GPU, by the path that fastlora chooses there, against the same on the CPU."""

import copy

import pytest
import torch
from torch import nn

from fastlora import LoRAConfig, fuse, inject_lora
from tests.support import gated
from tests.support.experts import MODELS, build, has_bank
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.gpu

KINDS = ("linear", "conv", "embedding")
IDS = torch.arange(24).reshape(2, 12) % 11
CASES = {  # a layer, the shape of its input, options
    "linear": (lambda: nn.Linear(64, 48), (2, 40, 64), {}),
    "conv1d": (lambda: transformers.pytorch_utils.Conv1D(48, 64), (2, 40, 64), {}),
    "convolution": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 8), {}),
    "grouped": (lambda: nn.Conv1d(16, 24, 3, groups=4), (2, 16, 20), {}),
    "volume": (lambda: nn.Conv3d(8, 16, 3, padding=1), (2, 8, 5, 6, 7), {}),
    "embedding": (lambda: nn.Embedding(11, 32), None, {}),
    "dora": (lambda: nn.Linear(64, 48), (2, 40, 64), {"use_dora": True}),
    "dora conv1d": (
        lambda: transformers.pytorch_utils.Conv1D(48, 64),
        (2, 40, 64),
        {"use_dora": True},
    ),
}


in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@in_both
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_what_it_does_on_the_cpu(case, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    make, shape, options = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    inject_lora(model, LoRAConfig(["0"], 8, 16.0, kinds=KINDS, adapter_dtype=dtype, **options))
    randomise_adapters(model)
    x = IDS if shape is None else torch.randn(shape).to(dtype)
    _compare(model, x, at_least=3)


@in_both
@pytest.mark.parametrize("name", MODELS)
def test_experts_compute_what_they_do_on_the_cpu(name, dtype):
    """With a routing that is given, since rounding can change one that is computed."""
    model = build(name)
    experts = next(filter(has_bank, model.modules()))
    inject_lora(model, LoRAConfig("all-linear", 4, 8.0, adapter_dtype=dtype))
    randomise_adapters(model)
    experts = experts.to(dtype)
    count = experts.down_proj.weight.shape[0]
    chosen = torch.rand(40, count).argsort(1)[:, :2]
    chosen[chosen == 1] = 0  # one without rows
    _compare(experts, torch.randn(40, 32).to(dtype), chosen, torch.rand(40, 2).to(dtype))


@in_both
def test_gated_mlps_compute_what_separate_layers_do_on_the_cpu(dtype):
    model = gated.net(adapter_dtype=dtype).to(dtype)

    def fused(model: nn.Module) -> nn.Module:
        assert fuse(model, gated.X.to(dtype).cuda()).blocks == gated.BLOCKS
        return model

    _compare(model, gated.X.to(dtype), prepare=fused)


def _compare(model, x, *others, prepare=lambda model: model, at_least=5) -> None:
    """The output and the gradients on the GPU, of a copy that is prepared there, with those on the CPU."""
    want = _step(model, x, *others)
    exact = _step(copy.deepcopy(model).double(), x, *others)
    on_gpu = [x.cuda(), *(t.cuda() for t in others)]
    got = _step(prepare(copy.deepcopy(model).cuda()), *on_gpu)
    assert got.keys() == want.keys() and len(got) >= at_least
    assert all(value.any() for value in exact.values())  # what is zero would show nothing
    for name, value in got.items():
        assert_close(value.cpu(), want[name], exact[name], name)


def _step(model: nn.Module, x: torch.Tensor, *others: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients of its mean square, that of x too where there is one."""
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    if x.is_floating_point():
        x = x.detach().to(dtype).requires_grad_()
    y = model(x, *(t.to(dtype) if t.is_floating_point() else t for t in others))
    y.double().square().mean().backward()
    found = {"y": y.detach()} | ({"x": x.grad} if x.is_floating_point() else {})
    return found | {name: p.grad for name, p in model.named_parameters() if "lora" in name}
