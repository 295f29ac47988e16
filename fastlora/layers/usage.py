"""How other code uses an adapted layer: whether it calls the layer, or only reads its weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Usage:
    """How other code has used an adapted layer; calls under torch.compile are not noted.

    called: its forward has run. read: an operation has used the value of its `weight`. read_in_training: also in training mode.
    dropout_warned: a warning has said that its dropout has no effect.
    """

    called: bool = False
    read: bool = False
    read_in_training: bool = False
    dropout_warned: bool = False

    @property
    def only_read(self) -> bool:
        """Whether other code multiplies by the weight itself and does not call the layer."""
        return self.read and not self.called
