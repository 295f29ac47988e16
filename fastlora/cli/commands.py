"""The command `fastlora`: inspect, merge, convert and compare adapters, as files and without a model."""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from fastlora.cli.adapter_files import (
    SCHEMES,
    convert,
    difference_norm,
    read_adapter,
    update_norm,
)
from fastlora.cli.merge import merge_files
from fastlora.errors import CheckpointError, FastLoRAError
from fastlora.io.adapter_state import AdapterState, LayerState

_EPILOG = """\
An ADAPTER is a .safetensors file of fastlora's or loralib's, or a folder in PEFT's format. Pickles are never read.
Every kind of layer is supported: linear, Conv1D of transformers ("transposed"), convolution, embedding; also DoRA, rsLoRA, PiSSA
and OLoRA. Nothing is overwritten without --force, and a file appears only when it is complete.

examples:
  fastlora inspect adapter.safetensors
  fastlora merge model.safetensors adapter.safetensors merged.safetensors
  fastlora convert adapter.safetensors peft_folder --to peft
  fastlora diff before.safetensors after.safetensors

exit code: 0; for diff 1 if the adapters differ; 2 if something is wrong with the input, with one line on stderr.
`fastlora COMMAND --help` says more about each.
"""

_INSPECT = """\
For each adapted layer: kind, the shapes of A and B, dtype, rank r, alpha, the applied scaling, and the size of the update as
Frobenius norms, |BA| and |dW| = scaling * |BA|. |BA| = 0 means that a layer was never trained. The initial product that PiSSA
and OLoRA subtract is subtracted in them; with DoRA |dW| depends on the base. "linear?" and "transposed?" are guesses: the file does not
say how the weight is stored.

examples:
  fastlora inspect adapter.safetensors
  fastlora inspect peft_folder --json
"""

_MERGE = """\
W + dW goes to OUT, layer by layer: summed in float32 or wider, rounded once to the dtype of W. Trained heads in the adapter
replace those of the base. Everything else is copied byte by byte. The share of the update that rounding lost is
printed: in bfloat16 it may be large. To keep all of it, merge in Python: layer.merge_weights(dtype=torch.float32).

examples:
  fastlora merge model.safetensors adapter.safetensors merged.safetensors
  fastlora merge model.safetensors.index.json peft_folder merged_folder    (a sharded base: OUT is a folder)
  fastlora merge model.safetensors loralib.safetensors merged.safetensors --alpha 16

A file does not say which weights a model ties together: if an adapted weight is tied, merge in Python (merged_model).
"""

_CONVERT = """\
fastlora   one file; kind, rank, alpha and the other settings of each layer are in its metadata
peft       a folder with adapter_config.json; loads with PeftModel.from_pretrained and fastlora.from_pretrained. PEFT adapts
           convolutions with groups, dilation or a padding mode in another way: they are refused
loralib    one file with loralib's keys, for load_state_dict(..., strict=False); no convolutions and no DoRA. It cannot hold
           alpha, so converting to it is refused unless you give, with --alpha, the lora_alpha that the loralib model will
           be built with
peft and loralib do not subtract an initial product (PiSSA, OLoRA): it becomes part of A and B, whose rank doubles.

examples:
  fastlora convert peft_folder adapter.safetensors --to fastlora
  fastlora convert adapter.safetensors peft_folder --to peft
  fastlora convert loralib.safetensors adapter.safetensors --to fastlora --alpha 16
"""

_DIFF = """\
For each layer: |dW| of A, |dW| of B, and |dW_A - dW_B|, where dW = scaling * B A, less an initial product that is subtracted. So two files may hold
other factors, ranks or key schemes and still be the same adapter. DoRA's magnitudes, and heads saved with the adapters,
are compared as they are.

examples:
  fastlora diff adapter.safetensors peft_folder
  fastlora diff step100.safetensors step200.safetensors --tolerance 0.01
"""


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: the arguments, default those of the process. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a layer's name may be in any script
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            code: int = arguments.run(arguments)
        except (FastLoRAError, OSError) as error:
            print(f"fastlora: error: {_printable(error)}", file=sys.stderr)
            code = 2
    for note in notes:
        print(f"fastlora: note: {_printable(note.message)}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("fastlora", description=__doc__, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=help, description=f"{help}.\n\n{description}", formatter_class=raw
        )
        made.set_defaults(run=run)
        return made

    inspect = command("inspect", _inspect, "Show what an adapter holds", _INSPECT)
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER")
    inspect.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    merge = command("merge", _merge, "Merge an adapter into a file of base weights", _MERGE)
    base_help = ".safetensors, or .index.json of a sharded base"
    merge.add_argument("base", type=Path, metavar="BASE", help=base_help)
    merge.add_argument("adapter", type=Path, metavar="ADAPTER")
    merge.add_argument("out", type=Path, metavar="OUT")
    converted = command("convert", _convert, "Write an adapter in another scheme", _CONVERT)
    converted.add_argument("source", type=Path, metavar="SRC")
    converted.add_argument("target", type=Path, metavar="DST")
    converted.add_argument("--to", required=True, choices=SCHEMES)
    diff = command("diff", _diff, "Compare the updates of two adapters", _DIFF)
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    tolerance_help = "relative difference up to which a layer counts as equal (default %(default)g)"
    diff.add_argument("--tolerance", type=float, default=1e-6, help=tolerance_help)
    alpha_help = "alpha of a loralib file, which does not hold its own"
    for parser_with_alpha in (merge, converted, diff):
        parser_with_alpha.add_argument("--alpha", type=float, help=alpha_help)
    for writer in (merge, converted):
        writer.add_argument("--force", action="store_true", help="replace an existing target")
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    adapter = read_adapter(arguments.adapter)
    rows = [_row(path, layer) for path, layer in adapter.layers.items()]
    others: list[dict[str, Any]] = [
        {"tensor": name, "shape": list(value.shape), "dtype": _dtype(value.dtype)}
        for name, value in adapter.others.items()
    ]
    if arguments.json:
        print(json.dumps({"scheme": adapter.scheme, "layers": rows, "others": others}, indent=1))
        return 0
    tensors = adapter.tensors().values()
    count = sum(t.numel() for t in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors)
    print(
        f"{_printable(arguments.adapter)}: {adapter.scheme}, {len(rows)} layers, {len(others)} other tensors, "
        f"{count:,} parameters, {size:,} bytes"
    )
    _table(
        ["layer", "kind", "A", "B", "dtype", "r", "alpha", "scaling", "|BA|", "|dW|", "variant"],
        [
            [
                row["layer"] or "(the whole model)",
                row["kind"] + ("" if row["kind_known"] else "?"),
                _shape(row["lora_A"]),
                _shape(row["lora_B"]),
                row["dtype"],
                str(row["r"]),
                *(_number(row[name]) for name in ("alpha", "scaling", "|BA|", "|dW|")),
                ", ".join(label for name, label in _VARIANTS.items() if row[name]),
            ]
            for row in rows
        ],
    )
    for other in others:
        print(f"also {_printable(other['tensor'])}  {_shape(other['shape'])}  {other['dtype']}")
    return 0


_VARIANTS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "subtracts_init": "init subtracted"}


def _row(path: str, layer: LayerState) -> dict[str, Any]:
    settings, norm = layer.settings(), update_norm(layer)
    scaling = None if layer.alpha is None else layer.scaling
    return {
        "layer": path,
        "lora_A": list(layer.lora_a.shape),
        "lora_B": list(layer.lora_b.shape),
        "dtype": _dtype(layer.lora_a.dtype),
        "r": settings.pop("rank"),
        "groups": layer.groups,
        "subtracts_init": layer.subtracts_init,
        "scaling": scaling,
        "|BA|": norm,
        "|dW|": None if scaling is None or layer.use_dora else abs(scaling) * norm,
        **settings,
        "kind_known": layer.kind_known,
    }


def _merge(arguments: argparse.Namespace) -> int:
    adapter = read_adapter(arguments.adapter, arguments.alpha)
    merged = merge_files(arguments.base, adapter, arguments.out, force=arguments.force)
    worst = max(merged, key=lambda layer: layer.lost)
    print(
        f"{_printable(arguments.out)}: merged {len(merged)} layers, replaced {len(adapter.others)} other tensors; "
        f"rounding to {_dtype(worst.dtype)} lost at most {100 * worst.lost:.2g}% of an update "
        f"({_printable(worst.path)})"
    )
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    # For loralib's scheme --alpha confirms the alpha that the file loses; otherwise it gives the one that the source lacks.
    confirms = arguments.to == "loralib"
    adapter = read_adapter(arguments.source, arguments.alpha, prefer_own=confirms)
    convert(adapter, arguments.target, arguments.to, force=arguments.force, alpha=arguments.alpha)
    print(f"{_printable(arguments.target)}: {len(adapter.layers)} layers, {arguments.to}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    a = read_adapter(arguments.a, arguments.alpha, prefer_own=True)
    b = read_adapter(arguments.b, arguments.alpha, prefer_own=True)
    rows, equal = [], True

    def compare(name: str, left: Any, right: Any, norm: Any, distance: Any) -> None:
        """Add the row of one layer or tensor of A and of B; one that is missing is None."""
        nonlocal equal
        norms = [norm(value) for value in (left, right) if value is not None]
        row = [name, *map(_number, norms)]
        if left is None or right is None:
            row.insert(1 if left is None else 2, "")
            rows.append([*row, "", f"only in {'B' if left is None else 'A'}"])
            equal = False
            return
        try:
            difference = distance(left, right)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        relative = difference / max(norms) if max(norms) else 0.0
        equal = equal and relative <= arguments.tolerance
        rows.append([*row, _number(difference), f"{relative:.2g}"])

    for path in dict.fromkeys([*a.layers, *b.layers]):
        layers = a.layers.get(path), b.layers.get(path)
        compare(path, *layers, lambda x: abs(x.scaling) * update_norm(x), difference_norm)
    ours, theirs = _plain_tensors(a), _plain_tensors(b)
    for name in dict.fromkeys([*ours, *theirs]):
        compare(name, ours.get(name), theirs.get(name), _norm, _distance)
    _table(["layer or tensor", "|A|", "|B|", "|A - B|", "relative"], rows)
    print("the same" if equal else "they differ")
    return 0 if equal else 1


def _plain_tensors(adapter: AdapterState) -> dict[str, Tensor]:
    """DoRA's magnitudes and the tensors saved with the adapter, which are compared as they are."""
    magnitudes = {
        f"{path}.lora_magnitude".lstrip("."): layer.tensors["lora_magnitude"]
        for path, layer in adapter.layers.items()
        if layer.use_dora
    }
    return magnitudes | adapter.others


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _distance(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        raise CheckpointError(f"shapes {_shape(left.shape)} and {_shape(right.shape)}")
    return _norm(left.double() - right.double())


def _table(head: list[str], rows: list[list[str]]) -> None:
    cells = [head, *([_printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]).rstrip())


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _printable(text: object) -> str:
    """One line without control characters: names in a file come from whoever wrote it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
