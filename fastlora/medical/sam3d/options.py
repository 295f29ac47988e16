"""`--model sam3d`: the options of SAM 3D Objects, and how they load the part that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from fastlora.errors import CheckpointError, ConfigError
from fastlora.medical.data.regions import RegionDataset
from fastlora.medical.models.options import NOT_NEGATIVE, PROBABILITY, check_options, one_of, option
from fastlora.medical.models.trainee import ModelOptions
from fastlora.medical.sam3d.decoder import Sam3dModel
from fastlora.medical.sam3d.generator import Sam3dFlow
from fastlora.medical.sam3d.latents import CachedRegions
from fastlora.medical.sam3d.loading import latent_scale, load_part, read_settings
from fastlora.medical.sam3d.part import Sam3dPart, set_torso
from fastlora.medical.sam3d.surface import LOSS_WEIGHTS

_sam3d = partial(option, "sam3d")


@dataclass(frozen=True)
class Sam3dOptions(ModelOptions):
    """The options. Raises: ConfigError if a value breaks its rule, naming it."""

    default_rank: ClassVar[int] = 4
    peak_lr: ClassVar[Mapping[str, float]] = {"lora": 1e-3, "full": 1e-4}
    loss_weights: ClassVar[Mapping[str, float]] = LOSS_WEIGHTS
    # The decoder predicts nothing without latents: with its adapters off it still needs the run's encoder.
    standalone_base: ClassVar[bool] = False
    same_to_compare: ClassVar[tuple[str, ...]] = ("latents_dir",)

    sam3d_dir: str | None = _sam3d(
        None,
        "model folder of SAM 3D Objects, which contains pipeline.yaml (required with sam3d)",
        resumable=True,
    )
    sam3d_part: str = _sam3d(
        "decoder",
        "part to train: decoder, the mesh decoder; slat, the generator of structured latents; structure, that of the sparse structure",
        one_of("decoder", "slat", "structure"),
    )
    sam3d_torso: str = _sam3d(
        "config",
        "precision of the frozen blocks; config: as the model folder states",
        one_of("config", "fp32", "fp16"),
    )
    sam3d_checkpointing: bool = _sam3d(
        False,
        "recompute activations in the backward pass, which takes less memory and more time",
        resumable=True,
    )
    latents_dir: str | None = _sam3d(
        None,
        "folder of cached latents of every region (default: train an encoder for the decoder's latents)",
        resumable=True,
    )
    drop_condition: float = _sam3d(
        0.1,
        "probability of training a generator without its condition, for guidance",
        PROBABILITY,
    )
    loss_vertex: float = _sam3d(
        LOSS_WEIGHTS["vertex"],
        "loss weight of the vertices' distance to the ground-truth surface",
        NOT_NEGATIVE,
    )
    loss_chamfer: float = _sam3d(
        LOSS_WEIGHTS["chamfer"],
        "loss weight of the distance between the points of the two surfaces",
        NOT_NEGATIVE,
    )
    loss_regularisation: float = _sam3d(
        LOSS_WEIGHTS["regularisation"],
        "loss weight of the decoder's own regularisation",
        NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def makes_mesh(self) -> bool:
        """Whether the decoder is trained; the generators output latents, not meshes."""
        return self.sam3d_part == "decoder"

    def check_makes_mesh(self, where: object) -> None:
        """See `ModelOptions`."""
        if not self.makes_mesh:
            raise CheckpointError(
                f"{where}: expected a run of a mesh decoder, got the generator {self.sam3d_part!r}, which makes no mesh; "
                "fastlora.load_adapter loads the run's adapter.safetensors into it"
            )

    def check(self, run: Mapping[str, Any]) -> None:
        """See `ModelOptions`."""
        if self.sam3d_dir is None:
            raise ConfigError("sam3d_dir: expected a model folder with model 'sam3d', got none")
        if run["base_weights"] is not None:
            raise ConfigError(
                "base_weights: expected none with model 'sam3d', whose sam3d_dir has them"
            )
        if run["finetune"] == "full" and self.sam3d_torso == "fp16":
            raise ConfigError("sam3d_torso: expected 'fp32' with finetune 'full', got 'fp16'")
        if run["amp"] != "off":
            raise ConfigError(
                f"amp: expected 'off' with model 'sam3d', whose precision sam3d_torso sets, got {run['amp']!r}"
            )
        if not self.makes_mesh and self.latents_dir is None:
            raise ConfigError(
                f"latents_dir: expected cached latents and conditions to train {self.sam3d_part!r} on, got none"
            )
        if self.latents_dir is not None and run["augment"]:
            raise ConfigError(
                "augment: expected --no-augment with latents_dir: cached latents do not move with their region"
            )
        if run["lora_ranks"]:
            raise ConfigError(
                f"lora_ranks: expected none with model 'sam3d', got {list(run['lora_ranks'])}"
            )

    def load(self, base_weights: str | None) -> Sam3dPart:
        """The part, untrained. Raises: as `load_part`, `read_settings` and `latent_scale` ."""
        folder, part = str(self.sam3d_dir), self.sam3d_part
        settings = None if self.makes_mesh else read_settings(folder, part)
        model = load_part(folder, part)
        set_torso(model, self.sam3d_torso, self.sam3d_checkpointing)
        if settings is None:
            return Sam3dModel(model, encoder=self.latents_dir is None)
        scale = latent_scale(folder, settings.latents["feats"][1]) if part == "slat" else None
        return Sam3dFlow(model, settings, scale, self.drop_condition)

    def regions(self, dataset: RegionDataset) -> RegionDataset | CachedRegions:
        """The dataset with the cached latents of `latents_dir`, if given. Raises: DataError if a region lacks them."""
        if self.latents_dir is None:
            return dataset
        about = read_settings(str(self.sam3d_dir), self.sam3d_part)
        return CachedRegions(dataset, self.latents_dir, about)
