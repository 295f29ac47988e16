"""Tied weights in a folder of PEFT: what a file says of one name must hold for the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastlora.errors import CheckpointError
from fastlora.io.safetensors_format import PEFT_PREFIX
from fastlora.model.wrappers import plain_names


def check_ties(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    heads: Mapping[str, nn.Module],
    bases: Mapping[str, str],
) -> None:
    """Raises: CheckpointError if a head, or a base weight in the file, is tied in the model but was not when PEFT saved it.

    bases: key in the file → name in the model, of the weights of adapted layers.
    """
    plain = plain_names(model)
    own = {plain(name): value for name, value in model.state_dict(keep_vars=True).items()}
    for name in (f"{path}.{key}" for path, head in heads.items() for key in head.state_dict()):
        tied = [key for key, tensor in own.items() if tensor is own[name] and key != name]
        for other in tied:
            inside = ".base_layer.".join(other.rsplit(".", 1))  # of an adapted layer
            value = tensors.get(PEFT_PREFIX + other, tensors.get(PEFT_PREFIX + inside))
            if value is None or not torch.equal(value, tensors[PEFT_PREFIX + name]):
                raise CheckpointError(
                    f"modules_to_save: {name} is tied to {other}, which has a different value "
                    "in the file; untie them in the model first"
                )
    for key, name in bases.items():
        for other in (k for k, tensor in own.items() if key in tensors and tensor is own[name]):
            value = tensors.get(PEFT_PREFIX + other, tensors[key])
            if not torch.equal(value, tensors[key]):
                raise CheckpointError(
                    f"{key}: {name} is tied to {other}, which has a different value in the file; "
                    "untie them in the model first"
                )


def refuse_tied_targets(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Raises: CheckpointError for a target whose weight is tied: under ensure_weight_tying PEFT ties adapters to those of the other layer."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, module in targets.items():
        names = owners.get(id(module.weight), [])
        if len(names) > 1:
            raise CheckpointError(
                f"ensure_weight_tying: {path} is tied ({', '.join(names)}), and PEFT adapts all of them with one adapter, "
                "which fastlora does not support"
            )
