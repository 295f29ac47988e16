"""A folder written by PEFT 0.21 with its outputs: it must stay readable without peft.

`expected.safetensors` holds the base's weights (`base.…`), an input `x`, PEFT's float64 output `y`, and the base's output `before`.
"""

import copy
import sys

import torch
from safetensors.torch import load_file
from torch import nn

from fastlora import from_pretrained, named_lora_layers, save_pretrained
from tests.support.paths import ROOT
from tests.support.tolerance import assert_close

FOLDER = ROOT / "tests" / "golden" / "peft_adapter"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def merged(model, x):
    """What plain torch computes in x's dtype from merged weights."""
    for layer in model.layers:
        x = torch.tanh(layer.merge_weights()(x))
    return model.head(x)


def test_a_folder_written_by_peft_gives_its_output(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    expected = load_file(FOLDER / "expected.safetensors")
    weights = {k.removeprefix("base."): v for k, v in expected.items() if k.startswith("base.")}
    model = Net()
    model.load_state_dict(weights)
    exact = copy.deepcopy(model).double()(expected["x"].double()).detach()
    assert_close(model(expected["x"]).detach(), expected["before"], exact)
    from_pretrained(model, FOLDER)
    assert [(p, m.rank, m.alpha) for p, m in named_lora_layers(model)] == [
        ("layers.0", 2, 7.0),
        ("layers.1", 3, 5.0),
    ]
    y = model(expected["x"]).detach()
    assert_close(y, merged(model, expected["x"]).detach(), expected["y"])
    save_pretrained(model, tmp_path)
    again = Net()
    again.load_state_dict(weights)
    from_pretrained(again, tmp_path)
    assert torch.equal(again(expected["x"]), y)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER, tmp_path))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
