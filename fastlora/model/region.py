"""Which part of a forward pass is checkpointed, as the code within it sees it."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils import checkpoint

# Torch's function for the innermost saved-tensor hooks; not in torch 2.6.
_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def region(random: bool) -> tuple[Any, ...]:
    """What identifies the checkpointed region of a call: its saved-tensor hooks, and where they do not tell the frame that runs it.

    They do not under torch 2.6, nor, which matters if the call is `random`, in reentrant checkpointing.

    A region is recomputed alone, from its own random state, so it must not use an output or a seed of another one.
    """
    hooks = None if _TOP_HOOKS is None else _TOP_HOOKS(True)
    # Reentrant checkpointing runs a region without gradients, or within a backward pass, and sets no hooks.
    plain = torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
    if _TOP_HOOKS is not None and (plain or not random):
        return (hooks,)
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _runs_region(frame.f_code):
        frame = frame.f_back
    return hooks, frame


def _runs_region(code: CodeType) -> bool:
    """Whether it is torch's checkpointing or an autograd function, as other packages' checkpointing is."""
    return code.co_filename == checkpoint.__file__ or code.co_varnames[:1] == ("ctx",)
