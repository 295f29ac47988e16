"""Corrupted and hostile files for every reader: a valid file of each kind, ways to corrupt it, and the errors that are allowed.

`fuzz` is the fuzzer: tests run it with few inputs, `tests/support/soak.py` with many.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

import fastlora
from fastlora import files
from fastlora.cli.convert import read_adapter
from fastlora.cli.merge import merge_files
from fastlora.errors import DataError, FastLoRAError
from fastlora.medical.data import grids, manifest, slice_source
from fastlora.medical.data.grids import StructureGrid
from fastlora.medical.sam3d.latents import read_latents
from fastlora.medical.sam3d.loading import PartSettings, latent_scale, read_settings
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.single import read_label_names
from fastlora.medical.scans.volumes import load_labels, load_png, load_volume
from fastlora.medical.training import checkpointing
from fastlora.medical.training.config import TrainConfig, read_yaml
from fastlora.medical.training.run_folder import RunFolder
from tests.support.layouts import Scan, write_dicom_scan
from tests.support.models import Decoder
from tests.support.sam3d_folder import STRUCTURE, TARGETS
from tests.support.tiny_run import tiny_trainer

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it logs every repair of a header

SECONDS = 20  # limit for one input, on a busy machine; most take a millisecond


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    valid: the bytes of a valid file. read: reads the corrupted file at a path. file: name of that file below the folder.
    inside: corrupt only the entries of a zip whose names end with it. header: most edits are in the first `header` bytes.
    """

    valid: bytes
    read: Callable[[Path], object]
    file: str
    inside: str | None = None
    header: int | None = None


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Context manager that raises AssertionError if its block takes longer."""

    def stop(*_: object) -> None:
        raise AssertionError(f"the reader did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def adapted() -> torch.nn.Module:
    model = Decoder()
    fastlora.inject_lora(model, ["to_qkv"], rank=2, alpha=4.0)
    fastlora.freeze_base_params(model)
    return model


def _yaml_run(path: Path) -> None:
    TrainConfig.from_dict(read_yaml(path))


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader by name; the valid files are written to `folder`."""
    model = adapted()
    fastlora.save_adapter(model, folder / "a.safetensors")
    torch.save(fastlora.get_lora_state_dict(model), folder / "a.pt")
    fastlora.save_pretrained(model, folder / "peft", include_trainable=False)
    config = fastlora.LoRAConfig(
        ["to_qkv", "to_q"], rank=8, rank_pattern={"to_q": 2}, exclude=["head"]
    )
    config.save(folder / "c.json")
    config.save(folder / "c.yaml")
    (folder / "run.yaml").write_text(yaml.safe_dump(TrainConfig(epochs=3, lr=1e-3).to_dict()))
    volume = np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "v.nii")
    trainer = tiny_trainer(folder / "run", epochs=1)
    trainer.train()
    last = folder / "run" / "checkpoints" / "last.pt"
    (folder / "cases" / "s1" / "segmentations").mkdir(parents=True)
    for name, array in (("ct.nii.gz", volume - 9), ("segmentations/liver.nii.gz", volume)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "cases" / "s1" / name)
    table = b"image_id;age;split\ns1;30;train\ns2;40;test\n"
    base = {k: v.clone() for k, v in Decoder().state_dict().items()}
    save_file(base, folder / "base-1.safetensors")
    index = {"weight_map": dict.fromkeys(base, "base-1.safetensors")}
    (folder / "base.safetensors.index.json").write_text(json.dumps(index))
    adapter = read_adapter(folder / "a.safetensors")

    def load(path: Path) -> None:
        fastlora.load_adapter(model, path)

    def peft(path: Path) -> None:
        fastlora.from_pretrained(Decoder(), path.parent)

    def inspect(path: Path) -> None:
        read_adapter(path.parent if path.name.startswith("adapter_") else path)

    def resume(path: Path) -> None:
        trainer.load_checkpoint(path)

    def merge(path: Path) -> None:
        merge_files(path, adapter, folder / "merged", force=True)

    weights = (folder / "peft" / "adapter_model.safetensors").read_bytes()
    peft_config = (folder / "peft" / "adapter_config.json").read_bytes()
    state, checkpoint = (folder / "a.pt").read_bytes(), last.read_bytes()
    safe, nifti = (folder / "a.safetensors").read_bytes(), (folder / "v.nii").read_bytes()
    return {
        "load_adapter .safetensors": Reader(safe, load, "x.safetensors", header=900),
        "load_adapter .pt": Reader(state, load, "x.pt"),
        "load_adapter .pt, its pickle": Reader(state, load, "x.pt", inside="data.pkl"),
        "read_adapter .safetensors": Reader(safe, inspect, "x.safetensors", header=900),
        "from_pretrained, weights": Reader(
            weights, peft, "peft/adapter_model.safetensors", header=900
        ),
        "from_pretrained, config": Reader(peft_config, peft, "peft/adapter_config.json"),
        "read_adapter, PEFT's config": Reader(peft_config, inspect, "peft/adapter_config.json"),
        "LoRAConfig.load JSON": Reader(
            (folder / "c.json").read_bytes(), fastlora.LoRAConfig.load, "x.json"
        ),
        "LoRAConfig.load YAML": Reader(
            (folder / "c.yaml").read_bytes(), fastlora.LoRAConfig.load, "x.yaml"
        ),
        "TrainConfig YAML": Reader((folder / "run.yaml").read_bytes(), _yaml_run, "x.yaml"),
        "read_checkpoint": Reader(checkpoint, checkpointing.read_checkpoint, "x.pt"),
        "load_checkpoint, its pickle": Reader(checkpoint, resume, "x.pt", inside="data.pkl"),
        "load_volume .nii": Reader(nifti, load_volume, "x.nii", header=352),
        "load_volume .nii.gz": Reader(gzip.compress(nifti), load_volume, "x.nii.gz"),
        "load_labels .nii": Reader(nifti, load_labels, "x.nii", header=352),
        "find_cases meta.csv": Reader(
            table, lambda path: find_cases(path.parent), "cases/meta.csv"
        ),
        "merge_files index": Reader(json.dumps(index).encode(), merge, "x.safetensors.index.json"),
        **_format_readers(folder),
        **_run_readers(folder),
        **_dataset_readers(folder),
        **_cache_readers(folder),
        **(_dicom_readers(folder) if find_spec("highdicom") else {}),
    }


def _format_readers(folder: Path) -> dict[str, Reader]:
    """Adapter files of other programs."""
    path, other = "mid_block.attentions.0.proj_in", "down_blocks.1.resnets.0.conv1"
    factors = {path: (torch.ones(2, 6), torch.ones(5, 2))}
    factors[other] = (torch.ones(2, 4, 3, 3), torch.ones(6, 2, 1, 1))
    fields = {"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["proj_in", "conv1"]}
    named = {
        "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", {}),
        "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", fields),
        "torchtune": ("{}.lora_a.weight", "{}.lora_b.weight", {}),
    }
    found = {}
    for format, (a, b, metadata) in named.items():
        state = {}
        for layer, pair in factors.items():
            name = layer.replace(".", "_") if format == "kohya" else layer
            state |= {key.format(name): t.clone() for key, t in zip((a, b), pair, strict=True)}
            if format == "kohya":
                state[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
        file = folder / f"{format}.safetensors"
        save_file(
            state, file, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
        )
        size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        found[f"read_adapter of {format}"] = Reader(
            file.read_bytes(), read_adapter, "x.safetensors", header=size
        )
        if format == "torchtune":
            torch.save(state, folder / "tune.pt")
            data = (folder / "tune.pt").read_bytes()
            found["read_adapter .pt"] = Reader(data, read_adapter, "x.pt")
            found["read_adapter .pt, its pickle"] = Reader(
                data, read_adapter, "x.pt", inside="data.pkl"
            )
    return found


def _run_readers(folder: Path) -> dict[str, Reader]:
    """Files of a run other than its checkpoints."""
    valid = (folder / "run" / "history.json").read_bytes()
    read = RunFolder(folder / "run").read_history
    return {"history.json": Reader(valid, lambda _: read(), "run/history.json")}


def _dataset_readers(folder: Path) -> dict[str, Reader]:
    """Lists of cases, and images."""
    labels = np.arange(60, dtype=np.int16).reshape(3, 4, 5) % 3
    for root in ("decathlon", "nnunet"):
        for kind, name in (("imagesTr", "a_0000"), ("labelsTr", "a"), ("imagesTr", "a")):
            (folder / root / kind).mkdir(parents=True, exist_ok=True)
            array = labels if kind == "labelsTr" else labels - 1
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / root / kind / f"{name}.nii.gz")
    decathlon = {
        "modality": {"0": "CT", "1": "MRI"},
        "labels": {"0": "background", "1": "liver", "2": "left kidney"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }
    nnunet = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "whole": [1, 2]},
        "file_ending": ".nii.gz",
    }
    (folder / "nnunet" / "dataset.json").write_text(json.dumps(nnunet))
    (folder / "decathlon" / "dataset.json").write_text(json.dumps(decathlon))
    folds = [{"train": ["a"], "val": ["b"]}]
    (folder / "nnunet" / "splits_final.json").write_text(json.dumps(folds))
    nib.save(nib.MGHImage(labels, np.eye(4)), folder / "v.mgz")
    picture = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5).save(picture, "PNG")

    def cases(path: Path) -> None:
        for case in find_cases(path.parent):
            image = case.load_image()
            for name in case.structures:
                case.load_mask(name, image)

    return {
        "find_cases dataset.json, Decathlon": Reader(
            json.dumps(decathlon).encode(), cases, "decathlon/dataset.json"
        ),
        "find_cases dataset.json, nnU-Net": Reader(
            json.dumps(nnunet).encode(), cases, "nnunet/dataset.json"
        ),
        "find_cases splits_final.json": Reader(
            json.dumps(folds).encode(), cases, "nnunet/splits_final.json"
        ),
        "load_volume .mgz": Reader((folder / "v.mgz").read_bytes(), load_volume, "v.mgz"),
        **dict(_itk_readers(folder, labels)),
        "read_label_names": Reader(b"1 a\n", read_label_names, "n.txt"),
        "read_label_names .json": Reader(
            b'{"labels": {"a": 1, "2": "b"}}', read_label_names, "n.json"
        ),
        "load_png": Reader(
            picture.getvalue(), lambda path: load_png(path, (1.0, 1.0, 2.0)), "x.png"
        ),
    }


def _itk_readers(folder: Path, array: NDArray[np.int16]) -> Iterator[tuple[str, Reader]]:
    """MetaImage and NRRD, if SimpleITK is installed."""
    if find_spec("SimpleITK") is None:
        return
    import SimpleITK

    for ending in (".mha", ".nrrd"):
        path = folder / f"v{ending}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path), True)
        yield f"load_volume {ending}", Reader(path.read_bytes(), load_volume, path.name)


def _cache_readers(folder: Path) -> dict[str, Reader]:
    """The cache of preprocessing; its callers recompute a damaged entry, so it is read directly here."""
    root = folder / "prepared"
    (root / "s1" / "segmentations").mkdir(parents=True)
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[3:9, 3:9, 3:9] = 1
    for name, array in (("ct", mask.astype(np.int16) - 1), ("segmentations/liver", mask)):
        nib.save(nib.Nifti1Image(array, np.diag([2, 2, 2, 1])), root / "s1" / f"{name}.nii.gz")
    (case,) = find_cases(root)
    cache = folder / "cache"
    settings = slice_source.SliceConfig(crop_size=8, sdf_size=8)
    slice_source.load_prepared(case, "liver", settings, cache)
    StructureGrid.load(case, "liver", cache)
    outcome = manifest.Outcome("s1", "liver", sources={"a": "b"}, files={"c": "d"})
    manifest.write_manifest(cache, {}, [outcome], [])
    slices = slice_source.cache_path(case, "liver", settings, cache).read_bytes()
    grid = grids.grid_path(case, "liver", cache).read_bytes()

    def listed(path: Path) -> None:
        manifest.usable_cases([case], path.parent)
        manifest.verify(path.parent)

    def arrays(layout: Any) -> Callable[[Path], object]:
        def read(path: Path) -> None:
            try:
                files.read_npz(path, layout)
            except (OSError, ValueError) as error:  # which its callers handle
                raise DataError(str(error)) from error

        return read

    coords = np.arange(12, dtype=np.int64).reshape(4, 3)
    latents = {"coords": coords, "feats": np.ones((4, 8), np.float32)}
    latents["condition"] = np.ones((2, 3), np.float32)
    np.savez(folder / "slat.npz", **latents)
    save_file({k: torch.from_numpy(v) for k, v in latents.items()}, folder / "slat.safetensors")
    slat = (folder / "slat.npz").read_bytes()
    named = {name: np.ones((4, 8), np.float32) for name in ("shape", "pose", "condition")}
    np.savez(folder / "structure.npz", **named)

    def structure(path: Path) -> None:
        read_latents(path, PartSettings(None, {"shape": (4, 8), "pose": (None, 8)}, 8))

    def voxels(path: Path) -> None:
        read_latents(path, PartSettings(16, {"feats": (None, 8)}, 3))

    # The YAML files of a model folder; its classes are built in tests/medical/sam3d/test_folder.py.
    sam3d = folder / "sam3d"
    about = {"ss_generator_config_path": "ss.yaml", "slat_mean": [0.5] * 8, "slat_std": [2.0] * 8}
    model = {"_target_": TARGETS["structure"], **STRUCTURE}
    sampler = {"_target_": "a.lognorm_sampler", "mean": 0.0, "std": 1.0}
    flow = {"reverse_fn": model, "sigma_min": 0.0, "training_time_sampler_fn": sampler}
    sam3d.mkdir()
    (sam3d / "pipeline.yaml").write_text(yaml.safe_dump(about))
    (sam3d / "ss.yaml").write_text(yaml.safe_dump({"module": {"generator": {"backbone": flow}}}))

    def generator(path: Path) -> None:
        read_settings(path.parent, "structure")
        latent_scale(path.parent, 8)

    return {
        "latents by name .npz, its arrays": Reader(
            (folder / "structure.npz").read_bytes(), structure, "y.npz", inside=".npy", header=128
        ),
        "SAM 3D's pipeline.yaml": Reader(
            (sam3d / "pipeline.yaml").read_bytes(), generator, "sam3d/pipeline.yaml"
        ),
        "a generator's YAML": Reader((sam3d / "ss.yaml").read_bytes(), generator, "sam3d/ss.yaml"),
        "latents of voxels .npz, its arrays": Reader(
            slat, voxels, "y.npz", inside=".npy", header=128
        ),
        "latents of voxels .safetensors": Reader(
            (folder / "slat.safetensors").read_bytes(), voxels, "y.safetensors", header=200
        ),
        "manifest.json": Reader(
            (cache / "manifest.json").read_bytes(), listed, "cache/manifest.json"
        ),
        "cached slices .npz": Reader(slices, arrays(slice_source.STORED), "x.npz"),
        "cached slices .npz, its arrays": Reader(
            slices, arrays(slice_source.STORED), "x.npz", inside=".npy", header=128
        ),
        "cached grid .npz, its arrays": Reader(
            grid, arrays(grids.STORED), "x.npz", inside=".npy", header=128
        ),
    }


def _dicom_readers(folder: Path) -> dict[str, Reader]:
    """One slice of a series, and a SEG in the same folder."""
    grid = np.arange(6 * 5 * 3, dtype=np.int16).reshape(6, 5, 3) - 9
    mask = np.zeros(grid.shape, bool)
    mask[1:4, 1:4] = True
    write_dicom_scan(folder / "dicom" / "s1", Scan("s1", "ct", grid, np.eye(4), {"liver": mask}))
    (slice_0, *_) = sorted((folder / "dicom" / "s1" / "images").iterdir())

    def series(path: Path) -> None:
        for case in find_cases(folder / "dicom"):
            case.load_mask("liver", case.load_image())

    def below(path: Path) -> str:
        return str(path.relative_to(folder))

    segmentation = folder / "dicom" / "s1" / "segmentation.dcm"
    return {
        "DICOM series": Reader(slice_0.read_bytes(), series, below(slice_0), header=1200),
        "DICOM SEG": Reader(segmentation.read_bytes(), series, below(segmentation)),
    }


NUMBERS = [
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"18446744073709551616",
    b"9" * 400,
    b"null",
    b'"\\u0000"',
]
TOKENS = [
    *(b"..", b"../../x", b"/etc/passwd", b"[[", b"{", b"}", b'"', b"\x00", b"\xff\xff\xff\xff"),
    *(b"&a [*a,*a]", b"!!python/name:os.system", b"<<: ", b"(a+)+$", b"\xc3\x28", b"\n", b"R", b"c"),
    *(b"\x7f\xff\xff\xff", b"\x80", b"\x00" * 8, b"."),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "cut", "drop", "token", "number", "copy"]),
        st.floats(0, 1, width=32),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)


def corrupt(data: bytes, edits: list[tuple[str, float, int]], header: int | None = None) -> bytes:
    """Apply the edits (kind, position as a fraction of the length, value) to `data`."""
    for kind, where, value in edits:
        size = len(data) if header is None or value % 4 == 0 else min(header, len(data))
        at = int(where * max(0, size - 1))
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ (1 << value % 8)] if data else []) + data[at + 1 :]
        elif kind == "byte":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + 1 + value % 16 :]
        elif kind == "token":
            data = data[:at] + TOKENS[value % len(TOKENS)] + data[at:]
        elif kind == "number":
            end = at
            while end < len(data) and data[end : end + 1].isdigit():
                end += 1
            data = data[:at] + NUMBERS[value % len(NUMBERS)] + data[end:]
        else:
            data = data[: at + value] + data[at:]
    return data


def corrupt_inside(archive: bytes, ending: str, edits: list[tuple[str, float, int]]) -> bytes:
    """Corrupt the entries of a zip whose names end with `inside`; the zip stays valid."""
    source, result = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(
                entry.filename, corrupt(data, edits) if entry.filename.endswith(ending) else data
            )
    return result.getvalue()


def fuzz(reader: Reader, folder: Path, inputs: int, number: int = 0) -> int:
    """Read `inputs` corrupted files and return how many were refused.

    Any other error than fastlora's, or a hang, is raised for the smallest input that causes it.
    """
    path = folder / reader.file
    before = path.read_bytes() if path.exists() else None
    refused = 0

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(EDITS)
    def run(edits: list[tuple[str, float, int]]) -> None:
        nonlocal refused
        data = (
            corrupt_inside(reader.valid, reader.inside, edits)
            if reader.inside
            else corrupt(reader.valid, edits, reader.header)
        )
        path.write_bytes(data)
        with warnings.catch_warnings(), time_limit():
            warnings.simplefilter("ignore")
            try:
                reader.read(path)
            except FastLoRAError as error:
                assert str(error)
                refused += 1

    try:
        run()
    finally:
        if before is not None:
            path.write_bytes(before)
    return refused


def replace_leaf(value: Any, number: int, other: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose leaf `number` (modulo the number of leaves) is `other`."""
    leaves: list[tuple[Any, ...]] = []

    def collect(item: Any, path: tuple[Any, ...]) -> None:
        pairs = (
            item.items()
            if isinstance(item, dict)
            else enumerate(item)
            if isinstance(item, (list, tuple))
            else ()
        )
        if path:
            leaves.append(path)
        for key, inner in pairs:
            if len(path) < 3 or not isinstance(inner, int):
                collect(inner, (*path, key))

    collect(value, ())
    path = leaves[number % len(leaves)]

    def rebuild(item: Any, rest: tuple[Any, ...]) -> Any:
        if not rest:
            return other
        if isinstance(item, dict):
            return {**item, rest[0]: rebuild(item[rest[0]], rest[1:])}
        parts = list(item)
        parts[rest[0]] = rebuild(parts[rest[0]], rest[1:])
        return type(item)(parts)

    return rebuild(value, path)
