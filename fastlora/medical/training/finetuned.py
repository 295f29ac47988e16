"""The fine-tuned model: the base of a run, its trainable weights, and the model of a run or of a file loaded back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from fastlora import load_adapter, merged_model, named_lora_layers
from fastlora.errors import CheckpointError, ConfigError
from fastlora.files import check_tensors
from fastlora.medical.data.batch import RegionBatch
from fastlora.medical.models.trainee import Trainee
from fastlora.medical.training.adapter_run import read_adapter_run
from fastlora.medical.training.checkpointing import model_sha256, read_checkpoint
from fastlora.medical.training.config import TrainConfig, only_paths, read_yaml
from fastlora.medical.training.run_folder import RunFolder

log = logging.getLogger(__name__)

ADAPTER = ".safetensors"
"""The ending of an adapter file; any other file is a checkpoint."""


def load_base(config: TrainConfig) -> Trainee:
    """The model of a configuration, untrained. Raises: CheckpointError or ConfigError, naming the problem."""
    return config.options.load(config.base_weights)


def predict(model: Trainee, batch: RegionBatch) -> Tensor:
    """A mesh model's signed distances (B, 32, 32, 32) for a batch on its device."""
    return model.distances(model(*model.inputs(batch)))


def make_trainable(model: Trainee, config: TrainConfig) -> None:
    """Makes trainable what `config.finetune` names: injected adapters and what the model trains around them, or everything.

    Raises: ConfigError if all weights are to be trained, and some have 16 bits.
    """
    if config.finetune == "full":
        model.train_all()
    else:
        model.adapt(**config.adapters)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; a checkpoint holds exactly these."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def without_values(model: Trainee) -> Trainee:
    """A copy of a model's structure on the meta device, which takes no memory."""
    # deepcopy takes the tensors from the memo instead of copying them.
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What a file holds of a fine-tuned model: a checkpoint of a run, or an adapter file.

    file: the one that was read. folder: the run folder that it lies in, if it does. config: of the run.
    content: of a checkpoint, or of `read_adapter_run`.
    """

    file: Path
    folder: Path | None
    config: TrainConfig
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path, which: str = "best", **paths: str | None) -> Finetuned:
        """Reads a run folder, a checkpoint of any place, or an adapter file.

        which: the checkpoint of a run folder, `best`, `last` or `epoch_NNN`. paths: options such as `base_weights` that replace
        those of the run; None keeps them. The configuration is that in the file; in a run folder its paths are those of config.yaml.

        Raises: CheckpointError if there is no such file, or it cannot be read. ConfigError if its configuration cannot be used.
        """
        path = Path(path)
        if not path.exists():
            raise CheckpointError(
                f"{path}: expected a run folder, a checkpoint (.pt) or an adapter file (.safetensors), got no such path"
            )
        file = path if path.is_file() else RunFolder(path).find(which)
        home = RunFolder.of(file)
        content = read_adapter_run(file) if file.suffix == ADAPTER else read_checkpoint(file)
        config = dict(content["config"])
        undescribed = (
            content["base_sha256"] is None
        )  # an adapter file that is not of a run, or of an older version
        if home is not None:
            stored = read_yaml(home.config)
            config = stored if undescribed else config | only_paths(stored)
        elif undescribed:
            log.warning(
                "%s: does not say which base, data and split it was trained on; assumed are the packaged base, or --base_weights, and the "
                "defaults, so a training region may be in the test set",
                file,
            )
        elif "latents_dir" in content.get("paths", ()) and paths.get("latents_dir") is None:
            raise CheckpointError(
                f"{file}: was trained on cached latents, whose folder it does not name; expected it in its run folder"
            )
        config |= {name: value for name, value in paths.items() if value is not None}
        try:
            return cls(
                file, None if home is None else home.path, TrainConfig.from_dict(config), content
            )
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @property
    def name(self) -> str:
        """`best`, `last` or `epoch_NNN` of a run folder, otherwise the name of the file."""
        return self.file.name if self.is_adapter or self.folder is None else self.file.stem

    @property
    def is_adapter(self) -> bool:
        """Whether the file holds only the trained weights, and not what resuming needs."""
        return self.file.suffix == ADAPTER

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The trained weights by name."""
        weights: Mapping[str, Tensor]
        weights = load_file(self.file) if self.is_adapter else self.content["model"]
        return weights

    def _check_ranks(self) -> None:
        """Refuses ranks that no stored tensor has, before adapters of that rank take memory. Raises: CheckpointError."""
        if self.config.finetune != "lora":
            return
        stored = [t.shape[0] for n, t in self.weights.items() if n.endswith("lora_A") and t.ndim]
        adapters = self.config.adapters
        named = max(adapters["rank"], *adapters["rank_pattern"].values(), 0)
        if named > max(stored, default=0):
            raise CheckpointError(
                f"{self.file}: its settings name LoRA rank {named}, but its largest lora_A has {max(stored, default=0)}"
            )

    def model(
        self, merged: bool = False, base: Trainee | None = None, adapters: bool = True
    ) -> Trainee:
        """The model on the CPU in eval mode; arguments and errors as in `load_finetuned`."""
        self.config.options.check_makes_mesh(self.file)
        model = load_base(self.config) if base is None else base
        if self.content["base_sha256"] not in (None, model_sha256(model.base)):
            raise CheckpointError(
                f"{self.file}: was trained on another base model (its weights differ); expected the right one, which --base_weights names"
            )
        self._check_ranks()
        make_trainable(model, self.config)
        if self.is_adapter:
            try:
                load_adapter(model.exported, self.file)
            except CheckpointError as error:
                raise CheckpointError(f"{self.file}: {error}") from error
        else:
            check_tensors(self.weights, trainable_parameters(model), str(self.file))
            model.load_state_dict(self.weights, strict=False)
        if not adapters:
            for _, layer in named_lora_layers(model):
                layer.reset_lora_parameters()
        model.eval()
        if merged and self.config.finetune == "lora":
            return cast(Trainee, merged_model(model))
        return model


def load_finetuned(
    path: str | Path,
    merged: bool = False,
    which: str = "best",
    model: Trainee | None = None,
    adapters: bool = True,
) -> Trainee:
    """The fine-tuned model of a run or of a file, on the CPU and in eval mode.

    path, which: as in `Finetuned.read`.
    merged: fold the LoRA weights into plain layers.
    model: the base that the run started from, adapted in place; default: that of the run's configuration.
    adapters: False disables them and keeps the other trained weights.

    Raises: CheckpointError if there is no such checkpoint, it does not fit the base, or its model makes no mesh.
    """
    return Finetuned.read(path, which).model(merged, model, adapters)
