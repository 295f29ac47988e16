"""Banks of experts: the stacked weights of a mixture of experts, which are parameters of one module, as layers.

An `ExpertBank` is the layer of one stacked weight. `expert_banks` finds those of a module without changing it, `install_banks` puts layers in the
places of the parameters and `restore_banks` puts the parameters back.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlora.errors import InjectionError
from fastlora.ops.experts import grouped_linear
from fastlora.ops.routing import Routing, routing_of, rows_by_expert, sums_by_token

_INTERFACE = "transformers.integrations.moe"
_NAME = "fastlora"  # of the implementation of experts that is registered in transformers
# The parameters of experts that are banks, in the order in which their modules have them.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertBank(nn.Module):
    """The linear layers of G experts without biases, as one layer around their stacked weight.

    weight: (G, N, K), or (G, K, N) if `transposed`; shared, not copied.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed

    @property
    def matrices(self) -> Tensor:
        """The weight as (G, N, K), a view."""
        return self.weight.mT if self.transposed else self.weight

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The base output (M, N) for x (M, K), sorted by expert. offsets: (G + 1,) int32, as in `ops.experts.lora_experts`."""
        return grouped_linear(x, self.matrices, offsets)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.weight.shape))}, transposed={self.transposed}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register()


# The banks that were found and not installed, so that each is one object for as long as its module lives.
_FOUND: weakref.WeakKeyDictionary[nn.Module, dict[str, ExpertBank]] = weakref.WeakKeyDictionary()


def expert_banks(module: nn.Module) -> dict[str, ExpertBank]:
    """Attribute → bank of each stacked weight that is a parameter of `module` itself; empty unless `why_not_experts` returns None."""
    if not isinstance(module, nn.Module) or why_not_experts(module) is not None:
        return {}
    known = _FOUND.setdefault(module, {})
    found = {}
    for name in PROJECTIONS:
        weight = module._parameters.get(name)
        if weight is None or weight.ndim != 3 or parametrize.is_parametrized(module, name):
            continue
        bank = known.get(name)
        if bank is None or bank.weight is not weight:
            bank = known[name] = ExpertBank(weight, bool(getattr(module, "is_transposed", False)))
            bank.training = module.training
        found[name] = bank
    return found


def why_not_experts(module: nn.Module) -> str | None:
    """Why the forward of `module` cannot be replaced by one with adapters, or None if it can."""
    name = type(module).__name__
    moe = sys.modules.get(_INTERFACE)
    if moe is None:
        return f"the forward of {name} is its own; only experts of transformers 5 have one that can be replaced"
    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    if forward.__module__ != type(module).__module__ or "experts_interface" not in names:
        return f"the forward of {name} is its own; it does not follow transformers' use_experts_implementation"
    interface = forward.__closure__[names.index("experts_interface")].cell_contents  # type: ignore[index]
    if interface is not moe.ALL_EXPERTS_FUNCTIONS:
        return f"{name} has an interface of experts of its own"
    if "forward" in module.__dict__:
        return f"a package has set the forward of this {name}"
    if not hasattr(module, "config"):
        return f"{name} has no config that chooses its forward"
    return None


def named_layers(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, and each bank after its module, as if it were installed."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield path, module
        for name, bank in expert_banks(module).items():
            yield f"{path}.{name}".lstrip("."), bank


def install_banks(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put layers[bank] in the place of the parameter of each bank that `layers` has, and let its module run `experts_forward`."""
    for owner in list(model.modules()):
        for name, bank in expert_banks(owner).items():
            if bank in layers:
                _run(owner)
                del owner._parameters[name]
                owner._modules[name] = layers[bank]


def restore_banks(model: nn.Module) -> None:
    """Put the weight of each bank that has no adapter around it back as a parameter; a module without other banks runs its own forward."""
    for owner in list(model.modules()):
        for name, bank in list(owner._modules.items()):
            if isinstance(bank, ExpertBank) and why_not_experts(owner) is None:
                del owner._modules[name]
                owner.register_parameter(name, bank.weight)
        before = getattr(owner.__dict__.get("config"), "_fastlora_before", None)
        if before is not None and not any(name in owner._modules for name in PROJECTIONS):
            owner.config, names = before
            hooks: dict[int, Any] = owner._load_state_dict_pre_hooks
            for key in [key for key, one in hooks.items() if one.hook is _name_weights]:
                del hooks[key]
            for name in names:  # in the order from before
                owner._parameters[name] = owner._parameters.pop(name)


def _run(owner: Any) -> None:
    """Let `experts_forward` compute the module: transformers looks its implementation up by the name in the config."""
    if getattr(owner.config, "_experts_implementation", None) == _NAME:
        return
    before = owner.config  # which all layers of a model share
    own = copy.copy(before)
    # Not by the property, which sets it in the configs inside too: the copy shares those with the model.
    own._experts_implementation_internal = _NAME
    if own._experts_implementation != _NAME:
        name = type(before).__name__
        raise InjectionError(
            f"{name}: expected its _experts_implementation to choose the forward of experts"
        )
    own._fastlora_before = (before, tuple(owner._parameters))
    _register()
    owner.register_load_state_dict_pre_hook(_name_weights)
    owner.config = own


def _name_weights(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: rename, in place, the keys that the weights of installed banks have as parameters."""
    for name in PROJECTIONS:
        layer, before = owner._modules.get(name), prefix + name
        if layer is not None and before in state:
            inside = "" if isinstance(layer, ExpertBank) else "original_layer."
            state[f"{before}.{inside}weight"] = state.pop(before)


def _register() -> None:
    moe = sys.modules.get(_INTERFACE)
    if moe is not None and _NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(_NAME, experts_forward)


def experts_forward(
    owner: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The output (T, H) of the experts for tokens (T, H): each token by its experts (T, k), weighted by (T, k).

    Rows are sorted by expert once. An expert's number from G on marks a row that no expert of this process computes.
    """
    routing = routing_of(top_k_index, owner.num_experts)
    x = rows_by_expert(hidden_states, routing)
    has_gate = getattr(owner, "has_gate", True)
    rows = _project(owner, "gate_up_proj" if has_gate else "up_proj", x, routing)
    rows = owner._apply_gate(rows) if has_gate else owner.act_fn(rows)
    rows = _project(owner, "down_proj", rows, routing)
    if getattr(owner, "has_post_expert_norm", False):
        rows = owner.post_expert_norm(rows)
    weights = routing.in_rows(top_k_weights)
    if getattr(owner, "_is_expert_parallel", False):
        outside = routing.ids >= owner.num_experts
        rows, weights = rows.masked_fill(outside[:, None], 0.0), weights.masked_fill(outside, 0.0)
    y = sums_by_token(rows * weights[:, None], routing, hidden_states.shape[0])
    return y.to(hidden_states.dtype)


def _project(owner: Any, name: str, x: Tensor, routing: Routing) -> Tensor:
    """The output (M, N) of the stacked projection `name`, adapted or not, with its bias."""
    layer = owner._modules.get(name)
    if layer is not None:
        y: Tensor = layer(x, routing.offsets)
    else:
        weight = getattr(owner, name)
        transposed = getattr(owner, "is_transposed", False)
        y = grouped_linear(x, weight.mT if transposed else weight, routing.offsets)
    if not getattr(owner, "has_bias", False):
        return y
    bias: Tensor = getattr(owner, f"{name}_bias")
    return y + bias.to(y.dtype)[routing.ids.clamp(max=bias.shape[0] - 1)]
