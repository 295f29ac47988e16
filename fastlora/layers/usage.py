"""How other code uses an adapted layer: whether it calls the layer, or only reads its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(slots=True)
class Usage:
    """How other code has used an adapted layer; `with_compiled` adds what compiled code does.

    called: its forward has run. read: an operation has used the value of its `weight`. read_in_training: also in training mode.
    dropout_warned: a warning has said that its dropout has no effect.
    """

    called: bool = False
    read: bool = False
    read_in_training: bool = False
    dropout_warned: bool = False

    @property
    def only_read(self) -> bool:
        """Whether other code was seen to multiply by the weight itself and not to call the layer."""
        return self.read and not self.called

    def with_compiled(self, lora_a: Tensor) -> Usage:
        """Add the calls and reads in compiled code of the layer with this lora_A. Returns self."""
        self.called |= lora_a in _CALLED
        self.read |= lora_a in _READ
        return self


# lora_A of the layers that torch.compile has traced. A compiled function cannot note it in its calls: inside activation checkpointing
# Dynamo allows no side effects.
_CALLED, _READ = WeakIdKeyDictionary(), WeakIdKeyDictionary()


def _at_trace_time(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Let Dynamo call the function while it traces, with the real tensor, and not in the compiled code."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function  # torch.compiler.assume_constant_result does the same and imports Dynamo


@_at_trace_time
def note_compiled_call(lora_a: Tensor) -> None:
    """Note a call of the layer with this lora_A; for use in code that is compiled."""
    _CALLED[lora_a] = True


@_at_trace_time
def note_compiled_read(lora_a: Tensor) -> None:
    """Note a read of the weight of the layer with this lora_A; for use in code that is compiled."""
    _READ[lora_a] = True
