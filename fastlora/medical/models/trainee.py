"""The interface between models and training or evaluation, and that of the options of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastlora.medical.data.batch import RegionBatch

if TYPE_CHECKING:
    from fastlora.medical.data.regions import RegionDataset


class Trainee(nn.Module, ABC):
    """A model that can be trained and evaluated; `forward` takes the results of `inputs`."""

    @property
    def base(self) -> nn.Module:
        """The pretrained part; a run can only be resumed with the same weights of it."""
        return self

    @property
    def exported(self) -> nn.Module:
        """The part whose trained parameters are saved in the run's adapter file."""
        return self

    @property
    def shard_units(self) -> Sequence[nn.Module]:
        """Submodules that FSDP2 shards on their own, before the rest."""
        return ()

    @property
    def has_half(self) -> bool:
        """Whether some parameters have 16 bits (fp16)."""
        return any(p.dtype == torch.float16 for p in self.parameters())

    @abstractmethod
    def adapt(
        self, rank: int, alpha: float, dropout: float, ffn: bool, rank_pattern: Mapping[str, int]
    ) -> None:
        """Injects adapters and freezes the base.

        ffn: also adapt the feed-forward layers. rank_pattern: ranks of layers by name, instead of `rank`.
        """

    def train_all(self) -> None:
        """Makes every parameter trainable. Raises: ConfigError if some have 16 bits."""
        self.requires_grad_(True)

    @abstractmethod
    def inputs(self, batch: RegionBatch) -> tuple[Any, ...]:
        """The arguments of `forward` for a batch. Raises: ConfigError if the batch lacks an input of the model."""

    @abstractmethod
    def losses(
        self, output: Any, batch: RegionBatch, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Loss terms by name, 0-d, means over the batch's regions, among them the weighted `total`.

        output: of `forward`. weights: of the terms named in `ModelOptions.loss_weights`.
        """

    def distances(self, output: Any) -> Tensor:
        """Signed distances (B, 32, 32, 32) of an output: fine voxels, negative inside. Only if the model `makes_mesh`."""
        raise NotImplementedError(f"{type(self).__name__} makes no mesh")


class ModelOptions(ABC):
    """A value of `--model`: a dataclass of the options that only this model has, with its defaults and its loader.

    default_rank, default_ranks: LoRA's rank, and the ranks of layers by name, if no rank is given. peak_lr: of AdamW
    by the kind of fine-tuning. loss_weights: the default weight of each loss term. standalone_base: whether the base
    predicts without the layers that are trained around it. same_to_compare: options that must be equal in two runs that are compared.
    """

    default_rank: ClassVar[int]
    default_ranks: ClassVar[tuple[str, ...]] = ()
    peak_lr: ClassVar[Mapping[str, float]]
    loss_weights: ClassVar[Mapping[str, float]]
    standalone_base: ClassVar[bool] = True
    same_to_compare: ClassVar[tuple[str, ...]] = ()

    @property
    def makes_mesh(self) -> bool:
        """Whether the model predicts a surface. The best epoch is that with the highest Dice, otherwise that with the lowest loss."""
        return True

    def check_makes_mesh(self, where: object) -> None:
        """Raises: CheckpointError, beginning with `where`, unless `makes_mesh`."""
        return None

    def check(self, run: Mapping[str, Any]) -> None:
        """Refuses options of the run that this model cannot use. Raises: ConfigError, naming the option."""
        return None

    @abstractmethod
    def load(self, base_weights: str | None) -> Trainee:
        """The model, untrained. Raises: CheckpointError or ConfigError, naming the problem."""

    def regions(self, dataset: RegionDataset) -> Any:
        """The dataset with the additional inputs of this model. Raises: DataError if a region lacks them."""
        return dataset
