"""The progress of a run: a progress bar, TensorBoard scalars, and a log line after each epoch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastlora.medical.training.state import RunState

log = logging.getLogger(__name__)


class RunReport:
    """Reports the progress of a run until `close`.

    board: the folder of TensorBoard's files. active: False in all processes except the first; they report nothing.
    """

    def __init__(self, state: RunState, board: Path, active: bool) -> None:
        self.state, self.config = state, state.config
        steps, purge = state.steps_per_epoch, state.epoch + 1 if state.history else None
        self._board = SummaryWriter(str(board), purge_step=purge) if active else None
        self._bar = tqdm(
            total=self.config.epochs * steps,
            initial=state.epoch * steps + len((state.within or {}).get("norms", ())),
            desc=f"{self.config.finetune} fine-tuning",
            unit="step",
            disable=None if self.config.progress and active else True,  # None: on a terminal only
        )

    def close(self) -> None:
        """Ends the bar and TensorBoard's files."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def step(self, loss: float) -> None:
        """Reports an optimizer step. loss: of its last micro-batch."""
        self._bar.set_postfix(epoch=self.state.epoch + 1, loss=f"{loss:.4f}")
        self._bar.update()

    def restart_epoch(self, micro_batch: int) -> None:
        """Reports that memory ran out. micro_batch: the new number of regions in a micro-batch."""
        self._bar.n = self.state.epoch * self.state.steps_per_epoch
        log.warning(
            f"out of memory: epoch {self.state.epoch + 1} restarts in micro-batches of {micro_batch}"
        )

    def epoch(self, entry: dict[str, Any], best: bool) -> None:
        """Reports an epoch. entry: of the history. best: whether it is the best epoch so far."""
        if self._board is None:
            return
        epoch = entry["epoch"]
        subsets = {name: entry[name] for name in ("train", "val") if name in entry}
        figures = {
            f"{subset}/{name}": v for subset, terms in subsets.items() for name, v in terms.items()
        }
        figures |= {name: entry[name] for name in ("lr", "grad_norm") if name in entry}
        for name, value in figures.items():
            self._board.add_scalar(name, value, epoch)
        self._board.flush()
        if empty := max(terms.get("empty", 0.0) for terms in subsets.values()):
            log.warning(
                f"epoch {epoch}: the decoder gave no mesh for {100 * empty:.0f}% of the regions; only the loss terms of distances "
                "and regularisation train on them"
            )
        train = (
            f"train {subsets['train']['total']:.4f}" if "train" in subsets else "before training"
        )
        dice = f"dice {entry['val']['dice']:.4f}  " if "dice" in entry["val"] else ""
        log.info(
            f"epoch {epoch:3d}/{self.config.epochs}  {train}  val {entry['val']['total']:.4f}  "
            f"{dice}{self.state.seconds[-1]:.1f} s{'  best' if best else ''}"
        )
