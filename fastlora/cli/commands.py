"""The command `fastlora`: inspect, merge, convert and compare adapter files, without a model; and `bench`."""

from __future__ import annotations

import argparse
import io
import json
import math
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastlora.benchmark import command as benchmark
from fastlora.cli.convert import (
    FORMATS,
    PIPELINE_FORMATS,
    READ_FORMATS,
    components,
    convert,
    difference_norm,
    of_one_model,
    read_adapter,
    update_norm,
)
from fastlora.cli.merge import merge_files
from fastlora.errors import CheckpointError, ConfigError, FastLoRAError
from fastlora.files import drop_output
from fastlora.io.adapter_state import AdapterState, LayerState

_EPILOG = """\
An ADAPTER is a .safetensors file of fastlora, loralib, diffusers or kohya's sd-scripts, a file of torchtune, or a folder in PEFT's
format. The format is recognised. Files of torch.save (.pt, .pth, .bin, .ckpt) are read without running code; other pickles never are.
Every kind of layer is supported: linear, Conv1D of transformers ("transposed"), convolution, embedding; also DoRA, rsLoRA, PiSSA
and OLoRA. Nothing is overwritten without --force, and files are written atomically.

examples:
  fastlora inspect adapter.safetensors
  fastlora merge model.safetensors adapter.safetensors merged.safetensors
  fastlora convert adapter.safetensors peft_folder --to peft
  fastlora diff before.safetensors after.safetensors

exit code: 0; 1 for an input that is refused, with one line on stderr; 2 for wrong arguments. For diff 1 if the adapters differ, for
bench 1 if a result is wrong, and 2 for both others.
`fastlora COMMAND --help` describes each command.
"""

_INSPECT = """\
For each adapted layer: kind, the shapes of A and B, dtype, rank r, alpha, the applied scaling, and the size of the update as
Frobenius norms, |BA| and |dW| = scaling * |BA|. |BA| = 0 means that a layer was never trained. They exclude the initial product that
PiSSA and OLoRA subtract; with DoRA |dW| depends on the base. Files of loralib, and PEFT folders whose layers differ, do not store
whether a weight is transposed: the kind is then a guess, and merge checks it against the base. A file of a known format that is not
supported (LoHa, LoKr, IA3, prefix tuning, VeRA, a full model, GGUF, a pickle) is named in one line.

example:
  fastlora inspect peft_folder --json
"""

_MERGE = """\
Writes W + dW to OUT, layer by layer: summed in float32 or wider, rounded once to the dtype of W. Trained heads in the adapter
replace those of the base. Everything else is copied byte by byte. The share of the update that rounding lost is printed; in
bfloat16 it may be large. To lose nothing, merge in Python: layer.merge_weights(dtype=torch.float32). A result that is not finite
where the base is, is refused: nothing is written then.

BASE is a .safetensors file, the index of a sharded one, or a folder that transformers wrote: then OUT is a folder that AutoModel
loads, with config.json, the tokenizer and all other files except hidden ones and weights in other formats (what is not copied is
printed). OUT may not be or hold a file of BASE. A folder is written elsewhere and renamed: a merge that is killed leaves no OUT or
a complete one. --force replaces a folder as a whole, and only if it holds nothing but files that are written again.

examples:
  fastlora merge base_folder peft_folder merged_folder
  fastlora merge model.safetensors.index.json peft_folder merged_folder    (a sharded base: OUT is a folder)
  fastlora merge model.safetensors loralib.safetensors merged.safetensors --alpha 16

An adapted weight that is tied to another is refused, if config.json or a file of fastlora's tells. A layer or head that its model has
under several names is written under all of them that BASE has.
"""

_CONVERT = """\
fastlora   one file; kind, rank, alpha and the other settings of each layer are in its metadata
peft       a folder with adapter_config.json for PEFT and fastlora.from_pretrained. PEFT adapts convolutions with groups,
           dilation or a padding mode differently: they are refused
loralib    one file for load_state_dict(..., strict=False); no convolutions and no DoRA. It does not store alpha: pass the
           lora_alpha with which the loralib model will be built as --alpha
diffusers  one file for load_lora_weights, or without a pipeline's names for load_lora_adapter(prefix=None, use_safetensors=True); linear and
           convolution. --component NAME puts the name of a model (unet, transformer, text_encoder) before the paths
kohya      one file of sd-scripts; as diffusers, but no DoRA, and the paths must be those of unet, text_encoder or text_encoder_2

A file of diffusers or kohya may hold adapters of several models: --component names the one to write in the other formats, under its
own paths. Names in kohya's files have underscores for dots. They are resolved by the keys of --base, else by tables of known models;
a name that no table knows stays as it is, with a note. torchtune's files are read only, under the paths of torchtune's models.

All but fastlora do not subtract an initial product (PiSSA, OLoRA): it becomes part of A and B, whose rank doubles.

examples:
  fastlora convert peft_folder adapter.safetensors --to fastlora
  fastlora convert loralib.safetensors adapter.safetensors --to fastlora --alpha 16
  fastlora convert kohya.safetensors adapter.safetensors --to fastlora --component unet --base pipeline_folder
"""

_DIFF = """\
For each layer: |dW| of A, |dW| of B, and |dW_A - dW_B|, with dW as in `inspect`. So two files with different factors, ranks or
keys can be the same adapter. DoRA's magnitudes, and heads saved with the adapters, are compared as they are.

example:
  fastlora diff step100.safetensors step200.safetensors --tolerance 0.01
"""


_SETTINGS = ("layer", "kind", "lora_A", "lora_B", "dtype", "r", "alpha")
_COLUMNS = (*_SETTINGS, "scaling", "|BA|", "|dW|", "variant")
_VARIANTS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "subtracts_init": "init subtracted"}


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: the arguments, default those of the process. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a layer's name may have any characters
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            try:
                arguments = _parser().parse_args(argv)
                code: int = arguments.run(arguments)
            finally:
                sys.stdout.flush()  # here an error can still be reported
        except BrokenPipeError:
            drop_output()
            return 128 + signal.SIGPIPE
        except (FastLoRAError, OSError) as error:
            drop_output()
            print(f"fastlora: error: {_cell(error)}", file=sys.stderr)
            # 1 is a result of these two: the adapters differ (as of diff(1)), fastlora was wrong.
            code = 2 if arguments.run in (_diff, benchmark.run) else 1
    for note in dict.fromkeys(_cell(note.message) for note in notes):
        print(f"fastlora: note: {note}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("fastlora", description=__doc__, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, text: str, *paths: str) -> argparse.ArgumentParser:
        description = f"{help}.\n\n{text}"
        parser = commands.add_parser(name, help=help, description=description, formatter_class=raw)
        parser.set_defaults(run=run)
        for path in paths:
            parser.add_argument(path.lower(), type=Path, metavar=path)
        return parser

    inspect = command("inspect", _inspect, "Show the contents of an adapter", _INSPECT, "ADAPTER")
    inspect.add_argument(
        "--json",
        action="store_true",
        help="print JSON, for programs; null is what is unknown or not finite",
    )
    about = "Merge an adapter into a file of base weights"
    merge = command("merge", _merge, about, _MERGE, "BASE", "ADAPTER", "OUT")
    about = "Write an adapter in another format"
    converted = command("convert", _convert, about, _CONVERT, "SRC", "DST")
    converted.add_argument("--to", required=True, choices=FORMATS)
    base_help = "base model whose keys resolve the underscores in kohya's names: a safetensors file, a model's or a pipeline's folder"
    converted.add_argument("--base", type=Path, help=base_help)
    for reader in (inspect, converted):
        from_help = "format of the source (default: recognised)"
        reader.add_argument("--from", dest="source", choices=READ_FORMATS, help=from_help)
    for writer in (merge, converted):
        component_help = "model of a pipeline that the adapter belongs to, as unet"
        writer.add_argument("--component", metavar="NAME", help=component_help)
    diff = command("diff", _diff, "Compare the updates of two adapters", _DIFF, "A", "B")
    tolerance_help = "relative difference up to which a layer counts as equal (default %(default)g)"
    diff.add_argument("--tolerance", type=float, default=1e-6, help=tolerance_help)
    alpha_help = "alpha of a loralib file, which does not store it"
    for parser_with_alpha in (merge, converted, diff):
        parser_with_alpha.add_argument("--alpha", type=float, help=alpha_help)
    bench = command("bench", benchmark.run, benchmark.ABOUT, benchmark.TEXT)
    benchmark.add_arguments(bench)
    for writer in (merge, converted):
        writer.add_argument("--force", action="store_true", help="replace an existing target")
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    adapter = read_adapter(arguments.adapter, format=arguments.source)
    rows = [_row(path, layer) for path, layer in adapter.layers.items()]
    others: list[dict[str, Any]] = [
        {"tensor": name, "shape": value.shape, "dtype": _cell(value.dtype)}
        for name, value in adapter.others.items()
    ]
    if arguments.json:
        layers = [{name: _json_number(value) for name, value in row.items()} for row in rows]
        shown = {"format": adapter.format, "layers": layers, "others": others}
        print(json.dumps(shown, indent=1, allow_nan=False))
        return 0
    tensors = adapter.tensors().values()
    print(
        f"{_cell(arguments.adapter)}: {adapter.format}, {len(rows)} layers, {len(others)} other tensors, "
        f"{sum(t.numel() for t in tensors):,} parameters, {sum(t.nbytes for t in tensors):,} bytes"
    )
    _table(list(_COLUMNS), [[row[name] for name in _COLUMNS] for row in rows])
    for other in others:
        print("other", "  ".join(map(_cell, other.values())))
    return 0


def _row(path: str, layer: LayerState) -> dict[str, Any]:
    settings, norm = layer.settings(), update_norm(layer)
    scaling = None if layer.alpha is None else layer.scaling
    variants = [label for name, label in _VARIANTS.items() if getattr(layer, name)]
    return {
        "layer": path,
        "lora_A": layer.lora_a.shape,
        "lora_B": layer.lora_b.shape,
        "dtype": _cell(layer.lora_a.dtype),
        "r": settings.pop("rank"),
        "groups": layer.groups,
        "subtracts_init": layer.subtracts_init,
        "scaling": scaling,
        "|BA|": norm,
        "|dW|": None if scaling is None or layer.use_dora else abs(scaling) * norm,
        "variant": ", ".join(variants),
        **settings,
    }


def _json_number(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _merge(arguments: argparse.Namespace) -> int:
    names = arguments.base if arguments.base.exists() else None
    adapter = read_adapter(arguments.adapter, arguments.alpha, base=names)
    adapter = of_one_model(adapter, arguments.component)
    merged = merge_files(arguments.base, adapter, arguments.out, force=arguments.force)
    worst = max(merged, key=lambda layer: layer.lost)
    print(
        f"{_cell(arguments.out)}: merged {len(merged)} layers, replaced {len(adapter.others)} other tensors; "
        f"rounding to {_cell(worst.dtype)} lost at most {100 * worst.lost:.2g}% of an update "
        f"({_cell(worst.path)})"
    )
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    # For the format loralib --alpha confirms the alpha that the file does not store; otherwise it supplies the source's.
    confirms = arguments.to == "loralib"
    adapter = read_adapter(
        arguments.src,
        arguments.alpha,
        prefer_own=confirms,
        format=arguments.source,
        base=arguments.base,
    )
    written = convert(
        adapter,
        arguments.dst,
        arguments.to,
        force=arguments.force,
        alpha=arguments.alpha,
        component=arguments.component,
    )
    print(
        f"{_cell(arguments.dst)}: {len(written.layers)} layers, {arguments.to}, from {adapter.format}"
    )
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    if not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance: expected a number ≥ 0, got {arguments.tolerance:g}")
    a, b = (
        read_adapter(source, arguments.alpha, prefer_own=True)
        for source in (arguments.a, arguments.b)
    )
    if any(x.format not in PIPELINE_FORMATS or components(x) == [""] for x in (a, b)):
        # The paths of one of them are those of the model itself.
        a, b = (of_one_model(x, None) if len(components(x)) == 1 else x for x in (a, b))
    comparisons: list[tuple[dict[str, Any], dict[str, Any], Any, Any]] = [
        (a.layers, b.layers, lambda x: abs(x.scaling) * update_norm(x), difference_norm),
        (_plain_tensors(a), _plain_tensors(b), _norm, _distance),
    ]
    rows, equal = [], True
    for left, right, norm, distance in comparisons:
        for name in dict.fromkeys([*left, *right]):
            norms = [norm(side[name]) if name in side else 0.0 for side in (left, right)]
            if name not in left or name not in right:
                rows.append([name, *norms, "", f"only in {'A' if name in left else 'B'}"])
                equal = False
                continue
            try:
                difference = distance(left[name], right[name])
            except CheckpointError as error:
                raise CheckpointError(f"{name}: {error}") from None
            relative = difference / max(norms) if max(norms) else difference
            rows.append([name, *norms, difference, relative])
            equal = equal and relative <= arguments.tolerance
    _table(["layer or tensor", "|A|", "|B|", "|A - B|", "relative"], rows)
    print("the same" if equal else "they differ")
    return 0 if equal else 1


def _plain_tensors(adapter: AdapterState) -> dict[str, Tensor]:
    """DoRA's magnitudes and the tensors saved with the adapter, which are compared as they are."""
    factors, tensors = ("lora_A", "lora_B", "initial_A", "initial_B"), adapter.tensors()
    return {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in factors}


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _distance(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        raise CheckpointError(f"shapes {_cell(left.shape)} and {_cell(right.shape)}")
    return _norm(left.double() - right.double())


def _table(head: list[str], rows: list[list[Any]]) -> None:
    """Print the rows. A row begins with the path of a layer or the name of a tensor."""
    named = ([row[0] or "(the model)", *row[1:]] for row in rows)
    cells = [head, *([_cell(value) for value in row] for row in named)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *rest in cells:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *numbers]).rstrip())


def _cell(value: object) -> str:
    """A value as one line of text without control characters: names in a file are not trusted."""
    if value is None:
        return "?"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, torch.Size):
        return "x".join(map(str, value)) or "scalar"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    text = " ".join(str(value).split())
    return "".join(c if c.isprintable() else "?" for c in text)
