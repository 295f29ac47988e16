"""Every kind of layer on a GPU, by the path that fastlora chooses there, against the same layer on the CPU."""

import copy

import pytest
import torch
from torch import nn

from fastlora import LoRAConfig, inject_lora
from tests.support.models import randomise_adapters
from tests.support.tolerance import assert_close

transformers = pytest.importorskip("transformers")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_computes_what_it_does_on_the_cpu(case, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    make, shape, options = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    inject_lora(model, LoRAConfig(["0"], 8, 16.0, kinds=KINDS, adapter_dtype=dtype, **options))
    randomise_adapters(model)
    x = IDS if shape is None else torch.randn(shape).to(dtype)
    want, exact = _step(model, x), _step(copy.deepcopy(model).double(), x)
    got = _step(copy.deepcopy(model).cuda(), x.cuda())
    assert got.keys() == want.keys() and len(got) >= 3
    for name, value in got.items():
        assert_close(value.cpu(), want[name], exact[name], name)


def _step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients of its mean square, that of x too where there is one."""
    model.zero_grad(set_to_none=True)
    if x.is_floating_point():
        x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    y.double().square().mean().backward()
    found = {"y": y.detach()} | ({"x": x.grad} if x.is_floating_point() else {})
    return found | {name: p.grad for name, p in model.named_parameters() if "lora" in name}
