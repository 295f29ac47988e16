"""`preview` and `explain`: a table of a model's layers, with their adapters or the reason for none. Nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from fastlora.config import LoRAConfig, Targets
from fastlora.errors import BackendError, ConfigError, InjectionError
from fastlora.layers.banks import ExpertBank, expert_banks, named_layers, why_not_experts
from fastlora.layers.base import LoRALayer, named_lora_layers
from fastlora.layers.experts import LoRAExperts
from fastlora.layers.gated import layers_in_blocks
from fastlora.layers.kinds import kind_of, why_unsuitable
from fastlora.layers.linear import LoRALinear
from fastlora.layers.quantised import compute_dtype
from fastlora.layers.several import SeveralAdapters
from fastlora.model.selection import (
    Decision,
    attention_projections,
    decide,
    extra_trainable,
    pattern_text,
    select_layers,
    to_config,
    unmatched_pattern,
)
from fastlora.ops.dispatch import Choice
from fastlora.report.memory import adapter_sizes, format_bytes, shape_after_injection, shape_of

Status = Literal[
    "adapted", "selected", "no adapter", "not targeted", "excluded", "unsuitable", "container"
]


@dataclass(frozen=True)
class LayerRow:
    """One module of a `LayerTable`.

    path: its first name, or the one under which it was selected.
    kind: its class, or that of the wrapped layer.
    status: "adapted"; "selected" (by the config, to be adapted); "no adapter" (it could have one); "not targeted" or "excluded" by
        the config; "unsuitable" (it cannot have one); "container" (a target matches it, but it is not a layer).
    reason: the reason for the status.
    pattern: the config's pattern, or the rule for default targets, that selects or excludes it.
    rank, alpha, dropout: of the adapter that it has or would get; None without one.
    choice: backend and plan for the requested number of rows.
    trainable: number of trainable elements.
    saved_bytes: saved for the backward pass of that many rows, including the input.
    """

    path: str
    kind: str
    status: Status
    reason: str
    pattern: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    choice: Choice | None = None
    trainable: int = 0
    saved_bytes: int | None = None


@dataclass(frozen=True)
class LayerTable:
    """The result of `explain` and `preview`; `str(table)` is a printable table.

    rows: in module order, every layer that has an adapter or can have one, and every other module that owns a matrix.
    counts: pattern, or rule for default targets → number of layers that it selects or excludes.
    problems: what `inject_lora` would raise or warn about.
    sample_rows: the requested `rows`.
    """

    rows: tuple[LayerRow, ...]
    counts: dict[str, int]
    problems: tuple[str, ...] = ()
    sample_rows: int | None = None

    def where(self, status: Status) -> tuple[LayerRow, ...]:
        """The rows with this status."""
        return tuple(row for row in self.rows if row.status == status)

    def __str__(self) -> str:
        tally = Counter(row.status for row in self.rows)
        lines = [", ".join(f"{count} {status}" for status, count in tally.items()) or "no layers"]
        if self.rows:
            header = ["layer", "class", "status", "r", "alpha", "dropout", "trains"]
            header += ["saved"] if self.sample_rows is not None else []
            table = [[*header, "why"], *(self._cells(row) for row in self.rows)]
            widths = [max(len(line[i]) for line in table) for i in range(len(header))]
            for line in table:
                cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)]
                lines.append("  ".join([*cells, line[-1]]).rstrip())
        lines += [f"pattern {pattern!r}: {count} layers" for pattern, count in self.counts.items()]
        if self.sample_rows is not None:
            total = sum(row.saved_bytes or 0 for row in self.rows)
            lines.append(
                f"saved for backward, {self.sample_rows:,} rows: at most {format_bytes(total)}, "
                "less where layers share an input"
            )
        return "\n".join(lines + [f"problem: {problem}" for problem in self.problems])

    def _cells(self, row: LayerRow) -> list[str]:
        saved = "" if row.saved_bytes is None else format_bytes(row.saved_bytes)
        return [
            row.path or "(the model)",
            row.kind,
            row.status,
            *("" if v is None else f"{v:g}" for v in (row.rank, row.alpha, row.dropout)),
            f"{row.trainable:,}" if row.trainable else "",
            *([saved] if self.sample_rows is not None else []),
            row.reason,
        ]


@overload
def explain(model: LoRALayer, x: Tensor) -> Choice: ...
@overload
def explain(
    model: nn.Module,
    x: None = None,
    *,
    rows: int | None = None,
    config: LoRAConfig | Targets | None = None,
) -> LayerTable: ...


def explain(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    rows: int | None = None,
    config: LoRAConfig | Targets | None = None,
) -> Choice | LayerTable:
    """Why each layer of a model has an adapter or not, and which backend and plan it uses. Nothing is computed.

    model: with `x`, one adapted layer, whose backend and plan for `x` (..., in_features) is returned. Without `x`, any module.
    rows: M of a call, the same for every layer, in its weight's dtype; adds each layer's plan and saved bytes to the table.
        An uninitialised tensor (M, in_features) is allocated for one layer at a time.
    config: the config of the injection; with it the table shows which layers were not targeted or excluded.

    Raises: BackendError if the layer given with `x` forces a backend that cannot run; a table has this as the row's reason.
    ConfigError for an invalid value, and for `x` with a module that is not an adapted layer.
    """
    if x is not None:
        if not isinstance(model, LoRALayer):
            raise ConfigError(
                f"x: expected only with an adapted layer, got a {type(model).__name__}; pass rows instead"
            )
        if rows is not None or config is not None:
            raise ConfigError("rows, config: expected only without x")
        return model.choose(x)
    _check_rows(rows)
    return _table(model, None if config is None else to_config(model, config), rows)


def preview(
    model: nn.Module,
    target_modules: Targets | LoRAConfig | None = None,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.0,
    *,
    rows: int | None = None,
) -> LayerTable:
    """The layers that `inject_lora` with the same arguments would wrap. The model is not changed.

    rows: as in `explain`. Errors and warnings of `inject_lora` about the model are in the table's `problems`.

    Raises: ConfigError for an invalid value.
    """
    _check_rows(rows)
    config = to_config(model, target_modules, rank, alpha, dropout)
    problems: list[str] = []
    try:
        selected = select_layers(model, config)
        unmatched = unmatched_pattern(model, config, selected)
        extra_trainable(model, config, selected)
        if unmatched is not None:
            problems.append(unmatched)
    except InjectionError as error:
        problems.append(str(error))
    return _table(model, config, rows, problems)


def _check_rows(rows: int | None) -> None:
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise ConfigError(f"rows: expected an integer ≥ 1 or None, got {rows!r}")


def _table(
    model: nn.Module, config: LoRAConfig | None, rows: int | None, problems: Sequence[str] = ()
) -> LayerTable:
    decisions: dict[nn.Module, Decision] = {}  # under the name that is selected, else the first
    for decision in [] if config is None else decide(model, config):
        if decision.module not in decisions or decision.config is not None:
            decisions[decision.module] = decision
    read = attention_projections(model)
    table = []
    adapters = [layer for _, layer in named_lora_layers(model)]
    together = {
        layer: module
        for module in model.modules()
        if isinstance(module, SeveralAdapters)
        for layer in module.layers
    }
    gated = layers_in_blocks(model)
    inside = {module for layer in adapters for module in layer.wrapped.modules()}
    for path, module in named_layers(model):
        if module in inside:
            continue
        if isinstance(module, LoRALayer):
            row = _adapted(path, module, config, rows, module in read)
            if module in together and module not in read:
                choice = together[module].choose()
                row = replace(row, choice=choice if rows is not None else None, reason=str(choice))
            if module in gated:
                row = replace(row, reason=f"{row.reason}; fused in a gated MLP")
            table.append(row)
        elif kind_of(module) is not None:
            table.append(_plain(path, module, decisions.get(module), config, rows, module in read))
        elif _holds_a_matrix(module):
            stacked = any(p.ndim > 2 for p in module.parameters(recurse=False))
            why = (why_not_experts(module) if stacked else None) or why_unsuitable(module)
            row = LayerRow(path, type(module).__name__, "unsuitable", str(why))
            table.append(replace(row, trainable=_trainable(module)))
        elif config is not None and (name := _target(config, path.rpartition(".")[2])) is not None:
            below = sum(
                kind_of(child) in config.kinds or isinstance(child, LoRALayer)
                for child in module.modules()
            )
            reason = f"a container of {below} layers, which have separate rows"
            table.append(LayerRow(path, type(module).__name__, "container", reason, name))
    counts: dict[str, int] = {}
    if config is not None:
        counts = {pattern_text(pattern): 0 for pattern in (*config.targets, *config.exclude)}
    for row in table:
        if row.pattern is not None and row.status != "container":
            counts[row.pattern] = counts.get(row.pattern, 0) + 1
    return LayerTable(tuple(table), counts, tuple(problems), rows)


def _adapted(
    path: str, layer: LoRALayer, config: LoRAConfig | None, rows: int | None, weight_read: bool
) -> LayerRow:
    choice, saved, reason = None, None, "has an adapter"
    if isinstance(layer, LoRAExperts):
        x = layer.lora_A.new_empty(
            rows or 1, layer.in_features, dtype=layer.original_layer.weight.dtype
        )
        choice = layer.choose(x)
        reason = str(choice)
    elif not isinstance(layer, LoRALinear):
        reason = str(layer.choose(layer.lora_A))
    elif rows is not None:
        dtype = compute_dtype(layer.original_linear)
        x = torch.empty(rows, layer.in_features, dtype=dtype, device=layer.lora_A.device)
        saved = shape_of(layer, weight_read).saved_bytes(rows)
        try:
            choice = layer.choose(x)
            reason = str(choice)
        except BackendError as error:
            reason = str(error)
    if weight_read:
        choice, reason = None, _weight_read(layer.dropout)
    return LayerRow(
        path,
        type(layer.wrapped).__name__,
        "adapted",
        reason,
        None if config is None else _target(config, path),
        layer.rank,
        layer.alpha,
        layer.dropout,
        choice,
        _trainable(layer),
        saved,
    )


def _plain(
    path: str,
    module: nn.Module,
    decision: Decision | None,
    config: LoRAConfig | None,
    rows: int | None,
    weight_read: bool,
) -> LayerRow:
    kind = kind_of(module)
    reason = f"not adapted (kind {kind!r})"
    row = LayerRow(path, type(module).__name__, "no adapter", reason, trainable=_trainable(module))
    if config is not None and kind not in config.kinds:
        name = _target(config, path)
        reason = f"kinds has no {kind!r}" + (f"; {name!r} matches it" if name else "")
        return replace(row, status="not targeted", reason=reason)
    own = None if decision is None else decision.config
    unsuitable = why_unsuitable(module, own)
    if decision is None:
        return row if unsuitable is None else replace(row, status="unsuitable", reason=unsuitable)
    row = replace(row, pattern=decision.pattern)
    if unsuitable is not None:
        return replace(row, status="unsuitable", reason=unsuitable)
    row = replace(row, path=decision.path, status=decision.status, reason=decision.reason)
    if own is None:
        return row
    return replace(
        row,
        reason=f"{row.reason}; {_weight_read(own.dropout)}" if weight_read else row.reason,
        rank=own.rank,
        alpha=own.alpha,
        dropout=own.dropout,
        trainable=sum(adapter_sizes(module, own)),
        saved_bytes=shape_after_injection(module, own, weight_read).saved_bytes(rows)
        if rows is not None and kind == "linear" and not isinstance(module, ExpertBank)
        else None,
    )


def _weight_read(dropout: float) -> str:
    """The reason for a projection of `nn.MultiheadAttention`, which is never called."""
    return (
        "nn.MultiheadAttention multiplies by the merged weight itself, recomputed at each call"
        + ("; dropout has no effect" if dropout else "")
    )


def _trainable(module: nn.Module) -> int:
    parameters = module.parameters(isinstance(module, LoRALayer) or kind_of(module) is not None)
    return sum(p.numel() for p in parameters if p.requires_grad and not nn.parameter.is_lazy(p))


def _holds_a_matrix(module: nn.Module) -> bool:
    """Whether the module seems to own a weight matrix: a parameter of two or more dimensions, or a class named "linear"."""
    leaf_by_name = "linear" in type(module).__name__.lower() and not module._modules
    banks = expert_banks(module)  # which have rows of their own, and biases (G, N)
    own = [] if banks else module.parameters(recurse=False)
    return leaf_by_name or any(nn.parameter.is_lazy(p) or p.ndim >= 2 for p in own)


def _target(config: LoRAConfig, path: str) -> str | None:
    """The first target that matches `path`, or None."""
    found = (p for p in config.targets if path and config.matches(p, path))
    return next(map(pattern_text, found), None)
