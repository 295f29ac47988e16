"""Parts of mixtures of experts in a model: which linear layers are routers, and which stacked weights are no layers."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fastlora.layers.banks import ExpertBank, expert_banks
from fastlora.layers.kinds import kind_of


def routers(model: nn.Module) -> set[nn.Module]:
    """The linear layers that choose experts: as many outputs as there are experts, beside them in one module."""
    found: set[nn.Module] = set()
    for module in model.modules():
        for experts in module.children():
            if not _has_stacks(experts):
                continue
            inside = set(experts.modules())
            found |= {
                layer
                for layer in module.modules()
                if isinstance(layer, nn.Linear)
                and layer not in inside
                and layer.out_features == getattr(experts, "num_experts", None)
            }
    return found


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are stacks of matrices outside layers and banks, such as those of experts whose forward cannot be replaced."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in model.named_modules()
        if kind_of(module) is None and not isinstance(module, (ParametrizationList, nn.Bilinear))
        for name, parameter in _stacks(module).items()
        if name not in expert_banks(module)
    }


def _has_stacks(module: nn.Module) -> bool:
    """Whether parameters of the module itself are stacks of matrices, or were before their banks were installed."""
    below = [grandchild for child in module.children() for grandchild in (child, *child.children())]
    return bool(_stacks(module)) or any(isinstance(layer, ExpertBank) for layer in below)


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the module itself that are stacks of matrices."""
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2 and parameter.is_floating_point() and min(parameter.shape) > 1
    }
