"""Banks of experts in PEFT's format, as its `target_parameters` stores them.

PEFT wraps the module that owns the parameters once for each of them, so its keys name the module: `experts.base_layer.lora_A.weight` belongs to the
parameter that comes first in it and `experts.lora_A.weight` to the last. lora_A is (G · R, K) by expert, and lora_B (N, R · G) by rank.
Here the keys and shapes of a file are turned into those of a layer at the parameter's path, lora_A (G, R, K) and lora_B (G, N, R), and back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fastlora.errors import CheckpointError
from fastlora.io.safetensors_format import PEFT_PREFIX
from fastlora.layers.banks import PROJECTIONS, ExpertBank
from fastlora.model.peft_rules import PeftConfig

_KEY = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+?)((?:\.base_layer)*)\.(lora_[AB]\.weight)")


def from_peft(config: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, those of banks under the paths of their parameters and in three dimensions.

    Raises: CheckpointError if the parameters of a module, or the shapes, do not fit the config.
    """
    depths: dict[str, set[int]] = {}
    for key in tensors:
        if (found := _KEY.fullmatch(key)) is not None:
            depths.setdefault(found[1], set()).add(found[2].count(".base_layer"))
    names = {owner: _names(config, owner) for owner in depths}
    result = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None or not names[found[1]]:
            result[key] = value
            continue
        owner, depth = found[1], found[2].count(".base_layer")
        if depths[owner] != set(range(len(names[owner]))):
            raise CheckpointError(
                f"target_parameters: expected adapters of {', '.join(names[owner])} of {owner}, got {len(depths[owner])}"
            )
        path = f"{owner}.{names[owner][-1 - depth]}"
        rank = config.layer(path)["rank"]
        result[f"{PEFT_PREFIX}{path}.{found[3]}"] = _by_expert(key, found[3], value, rank)
    return result


def to_peft(tensors: Mapping[str, Tensor], banks: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of `from_peft`, those of banks under PEFT's keys and in two dimensions. banks: the paths of the banks."""
    owners: dict[str, list[str]] = {}
    for path in sorted(banks, key=lambda path: PROJECTIONS.index(path.rpartition(".")[2])):
        owner, _, name = path.rpartition(".")
        owners.setdefault(owner, []).append(name)
    stems = {
        f"{PEFT_PREFIX}{owner}.{name}.": f"{PEFT_PREFIX}{owner}{'.base_layer' * depth}."
        for owner, names in owners.items()
        for depth, name in enumerate(reversed(names))
    }
    result = {}
    for key, value in tensors.items():
        stem = next((stem for stem in stems if key.startswith(stem)), None)
        if stem is None:
            result[key] = value
        elif key.endswith("lora_A.weight"):
            result[stems[stem] + "lora_A.weight"] = value.flatten(0, 1)  # (G, R, K) -> (G · R, K)
        else:  # (G, N, R) -> (N, R · G)
            result[stems[stem] + "lora_B.weight"] = value.permute(1, 2, 0).flatten(1).contiguous()
    return result


def in_present_order(
    tensors: Mapping[str, Tensor], targets: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The tensors of `from_peft`, those of a bank (G, N, K) that PEFT took for (G, K, N) as it takes it today.

    Before it knew the order of dimensions, its A for such a bank was (G, R, N) and its B (G, K, R). If N = K the file does not tell.

    targets: the modules to adapt, by path.
    """
    result = dict(tensors)
    for path, module in targets.items():
        keys = [f"{PEFT_PREFIX}{path}.lora_{factor}.weight" for factor in "AB"]
        if not isinstance(module, ExpertBank) or module.transposed or not result.keys() >= {*keys}:
            continue
        _, n, k = module.matrices.shape
        a, b = (result[key] for key in keys)
        if n != k and (a.shape[-1], b.shape[-2]) == (n, k):
            result[keys[0]], result[keys[1]] = b.mT.contiguous(), a.mT.contiguous()
    return result


def _names(config: PeftConfig, owner: str) -> list[str]:
    """The parameters of the module at `owner` that the config names, in the order in which the module has them."""
    wanted = config.target_parameters or ()
    names = {target.rpartition(".")[2] for target in wanted if _names_one_of(target, owner)}
    unknown = names.difference(PROJECTIONS)
    if unknown:
        raise CheckpointError(
            f"target_parameters: {owner}.{min(unknown)} is not supported by fastlora, only {', '.join(PROJECTIONS)}"
        )
    return [name for name in PROJECTIONS if name in names]


def _names_one_of(target: str, owner: str) -> bool:
    place = target.rpartition(".")[0]
    return not place or owner == place or owner.endswith(f".{place}")


def _by_expert(key: str, name: str, value: Tensor, rank: int) -> Tensor:
    size = value.shape[0 if name.startswith("lora_A") else -1]
    if value.ndim != 2 or size % rank:
        raise CheckpointError(
            f"{key}: expected {rank} ranks of each expert, got the shape {tuple(value.shape)}"
        )
    if name.startswith("lora_A"):
        return value.reshape(size // rank, rank, -1)
    return value.reshape(-1, rank, size // rank).permute(2, 0, 1).contiguous()
