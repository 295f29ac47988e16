"""Untrusted files: no code in them runs, no declared size is trusted, nothing is written outside the target. A short fuzzing run."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import files
from fastlora.cli.convert import read_adapter
from fastlora.cli.merge import merge_files
from fastlora.errors import CheckpointError, ConfigError, DataError
from fastlora.files import atomic_write, atomic_write_all
from fastlora.kernels.config import Problem, architecture, tiles
from fastlora.medical.evaluation.mesh_files import write_mesh
from fastlora.medical.models.decoder import load_base_model, save_base_model
from fastlora.medical.scans import volumes
from fastlora.medical.training import checkpointing
from fastlora.medical.training.config import read_yaml
from fastlora.ops import tuning_file
from tests.support.hostile import fuzz, readers, replace_leaf, time_limit
from tests.support.models import Decoder
from tests.support.tiny_run import tiny_trainer

INPUTS = 25


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder of valid files, and their readers by name."""
    folder = tmp_path_factory.mktemp("readers")
    return folder, readers(folder)


@pytest.mark.slow
def test_every_reader_refuses_corrupted_files_with_fastlora_errors(valid):
    folder, table = valid
    refused = {name: fuzz(reader, folder, INPUTS) for name, reader in table.items()}
    assert all(count > INPUTS // 4 for count in refused.values()), refused


def test_the_valid_files_can_be_read(valid):
    folder, table = valid
    for reader in table.values():
        (folder / reader.file).write_bytes(reader.valid)
        reader.read(folder / reader.file)


# Files of torch.save


def refused_torch(path, message):
    with pytest.raises(CheckpointError, match=message):
        fastlora.load_adapter(_adapted(), path)
    with pytest.raises(CheckpointError, match=message):
        checkpointing.read_checkpoint(path)


def _adapted():
    model = Decoder()
    fastlora.inject_lora(model, ["to_qkv"], rank=2)
    return model


def repack(source, target, compression=zipfile.ZIP_STORED, **changed):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            key = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, changed.get(key, old.read(name)))


class Call:
    """Pickles as a call of the function."""

    def __init__(self, function, *arguments):
        self.state = function, arguments

    def __reduce__(self):
        return self.state


def test_a_pickle_may_name_tensors_only(tmp_path):
    path = tmp_path / "x.pt"
    for value, name in (
        (Call(os.mkdir, "pwned"), "posix mkdir"),
        (Call(bytearray, 2**40), "bytearray"),  # weights_only would allocate it
        (Call(torch.Tensor, 2**40), "torch Tensor"),
        (torch.zeros(3).to_sparse(), "_rebuild_sparse_tensor"),
    ):
        torch.save({"a": value}, path)
        refused_torch(path, name)
    assert not Path("pwned").exists()


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, path)
    assert path.stat().st_size < 3000
    refused_torch(path, r"holds a tensor \(1048576, 1048576\) that is larger than its storage")


def test_expanding_and_deeply_nested_values_are_refused(tmp_path):
    bomb = [0.0] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    torch.save({"a": bomb}, tmp_path / "x.pt")
    refused_torch(tmp_path / "x.pt", "more values than the file has bytes")
    deep: list = []
    for _ in range(files.MAX_DEPTH + 1):
        deep = [deep]
    torch.save({"a": deep}, tmp_path / "x.pt")
    refused_torch(tmp_path / "x.pt", "nested more than 32 deep")


def test_archives_not_written_by_torch_save_are_refused(tmp_path):
    valid, path = tmp_path / "valid.pt", tmp_path / "x.pt"
    torch.save({"a": torch.zeros(2**20)}, valid)
    assert torch.equal(files.read_torch(valid)["a"], torch.zeros(2**20))
    repack(valid, path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000  # for 4 MiB
    refused_torch(path, "holds compressed entries")
    repack(valid, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(1))
    refused_torch(path, "expected one data.pkl, got 2")
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    refused_torch(path, "not a zip archive as torch.save writes it")
    # zipfile finds an archive in this file, torch a pickle.
    path.write_bytes(pickle.dumps(1) + valid.read_bytes())
    refused_torch(path, "not a zip archive")


def directory(data):
    """(the central directory of a file of torch.save, where it begins)."""
    size, start = struct.unpack("<QQ", data[-58:-42])
    return data[start : start + size], start


def end_records(count, size, start, own):
    """The zip64 record at the offset `own`, its locator and the end record."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 798, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, own, 1)
    return record + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0)


def hostile_archive(kind, folder):
    """A file whose directory torch reads elsewhere than zipfile, or reads otherwise; torch.load gives {"a": 2} for "zip64 locator"."""
    data = {}
    for value in (1, 2):
        torch.save({"a": value}, folder / "x.pt")
        data[value] = (folder / "x.pt").read_bytes()
    entries, start = directory(data[1])
    body, count = data[1][:start], struct.unpack("<Q", data[1][-66:-58])[0]
    (shown, own), end = (entries, len(body) + len(entries)), len(entries)
    if kind == "zip64 locator":
        hidden, begin = directory(data[2])
        moved = bytearray(hidden)
        position = 0
        while position < len(moved):  # the second archive's entries lie behind the first's
            offset = struct.unpack_from("<L", moved, position + 42)[0]
            struct.pack_into("<L", moved, position + 42, offset + start)
            position += 46 + sum(struct.unpack_from("<3H", moved, position + 28))
        body += data[2][:begin] + bytes(moved)
        record = end_records(count, len(moved), start + begin, 0)[:56]
        own, body = len(body), body + record
        # zipfile takes the directory before the end records, torch the record at `own`
        return body + shown + end_records(count, end, len(body), own)
    if kind == "prepended":
        return body[:300] + data[1]
    if kind == "trailing":
        return data[1] + b"\0" * 8
    if kind == "comment":
        return data[1][:-2] + struct.pack("<H", 22) + data[2][-22:]
    if kind == "count":
        return body + shown + end_records(count - 1, end, start, own)
    if kind == "directory offset":
        return body + shown + end_records(count, end, start - 46, own)
    if kind == "case":
        with zipfile.ZipFile(folder / "x.pt", "a") as archive:
            archive.writestr("x/DATA.PKL", pickle.dumps({"a": 2}))
        return (folder / "x.pt").read_bytes()
    if kind == "nul":
        name = (b"byteorder", b"data.pkl\0")
        return body.replace(*name) + shown.replace(*name) + data[1][start + end :]
    entry = bytearray(shown if kind.startswith("directory") else body)
    change = {
        "local name": (30, b"A"),
        "local method": (8, b"\x08"),
        "local size": (18, b"\1\0\0\0\1\0\0\0"),
        "directory size": (24, b"\xff"),
        "directory entry's offset": (42, b"\4"),
    }[kind]
    entry[change[0] : change[0] + len(change[1])] = change[1]
    if kind.startswith("directory"):
        return body + bytes(entry) + data[1][start + end :]
    return bytes(entry) + shown + data[1][start + end :]


HOSTILE_ARCHIVES = {
    "zip64 locator": "does not state where its directory is",
    "prepended": "does not state where its directory is",
    "trailing": "does not state where|not a zip file",
    "comment": "Bad magic number",
    "count": "does not state where its directory is",
    "directory offset": "does not state where its directory is",
    "case": "expected one data.pkl, got 2",
    "nul": "expected one data.pkl, got 2",
    "local name": "File name in directory .* differ",
    "local method": "its header does not fit the directory",
    "local size": "its header does not fit the directory",
    "directory size": "its header does not fit the directory",
    "directory entry's offset": "Bad magic number",
}


@pytest.mark.parametrize("kind", HOSTILE_ARCHIVES)
def test_an_archive_that_two_readers_may_read_differently_is_refused(kind, tmp_path):
    path = tmp_path / "hostile.pt"
    path.write_bytes(hostile_archive(kind, tmp_path))
    if kind == "zip64 locator":  # the attack is real: torch loads what zipfile does not see
        assert torch.load(path, weights_only=True) == {"a": 2}
        with zipfile.ZipFile(path) as archive:
            assert b"K\x01s." in archive.read("x/data.pkl")
    refused_torch(path, HOSTILE_ARCHIVES[kind])


def test_a_storage_larger_than_its_entry_is_not_read_beyond_it(tmp_path):
    torch.save({"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(80)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        program = archive.read("x/data.pkl")
    # the first storage, of 3 floats, is read as one of 80; torch 2.6 reads what lies behind it in memory
    assert program.count(b"K\x03tq\x07QK\x00K\x03\x85") == 1
    changed = program.replace(b"K\x03tq\x07QK\x00K\x03\x85", b"KPtq\x07QK\x00KP\x85")
    repack(tmp_path / "x.pt", tmp_path / "y.pt", data_pkl=changed)
    refused_torch(tmp_path / "y.pt", "storage 0: expected 320 bytes, got 12")
    missing = program.replace(b"X\x01\x00\x00\x000q", b"X\x01\x00\x00\x009q")
    repack(tmp_path / "x.pt", tmp_path / "z.pt", data_pkl=missing)
    refused_torch(tmp_path / "z.pt", "storage 9: expected 12 bytes, got 0")
    repack(tmp_path / "x.pt", tmp_path / "p.pt", data_pkl=b"\x80\x02}r\xff\xff\xff\x7f.")
    refused_torch(tmp_path / "p.pt", "more memory than the file has bytes")


def test_ordinary_state_dicts_are_read(tmp_path):
    state = Decoder().state_dict()
    assert isinstance(state, OrderedDict)
    kinds = [torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.uint16, torch.complex64]
    values = {str(kind): torch.zeros(3, dtype=kind) for kind in kinds}
    content = {"state": state, "view": torch.arange(6.0)[2:4], "n": (1, 2.5, "x", None), **values}
    torch.save({**content, "p": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    read = files.read_torch(tmp_path / "x.pt")
    assert read["state"].keys() == state.keys() and read["n"] == content["n"]
    assert torch.equal(read["view"], content["view"]) and torch.equal(read["p"], torch.ones(2))
    assert all(read[str(kind)].dtype == kind for kind in kinds)


def test_every_leaf_of_a_checkpoint_is_checked(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", epochs=1)
    trainer.train()
    content = checkpointing.read_checkpoint(trainer.folder.find("last"))
    others = (None, -(2**40), "text", [[]], {}, 1e300, torch.zeros(2**10), torch.zeros(1))
    refused = 0
    for number in range(0, 400, 3):
        torch.save(replace_leaf(content, number, others[number % len(others)]), tmp_path / "x.pt")
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        try:
            trainer.load_checkpoint(tmp_path / "x.pt")
        except CheckpointError:
            refused += 1
            now = trainer.model.state_dict()
            assert all(torch.equal(before[name], value) for name, value in now.items())
    assert refused > 90
    trainer.load_checkpoint(trainer.folder.find("last"))


def test_an_incomplete_history_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", epochs=1)
    trainer.train()
    content = checkpointing.read_checkpoint(trainer.folder.find("last"))
    record = content["history"][1]
    val = {name: value for name, value in record["val"].items() if name != "dice"}
    history = [content["history"][0], {**record, "val": val}]
    best = {k: v for k, v in content.items() if k != "best"} | {"seconds": [torch.zeros(1)]}
    torch.save({**content, "history": history}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="history: expected 'dice' among the validation"):
        tiny_trainer(tmp_path / "other", epochs=1, resume=str(tmp_path / "x.pt"))
    for change, message in (
        ({"seconds": [0.1, torch.zeros(1)]}, "seconds.1: expected float, got Tensor"),
        ({"seconds": [0.1, float("nan")]}, "history, seconds: expected finite numbers"),
        ({"best": best}, "best: seconds.0: expected float, got Tensor"),
    ):
        torch.save({**content, **change}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=message):
            trainer.load_checkpoint(tmp_path / "x.pt")


# Text


def test_yaml_bombs_and_tags_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    for text, message in (
        (bomb, "aliases .* are not read"),
        ("a: &a {x: 1}\nb: {<<: *a}\n", "aliases .* are not read"),
        ("a: !!python/object/apply:os.mkdir [pwned]\n", "could not determine a constructor"),
        ("a: 2001-99-99\n", "month must be in 1..12"),
        ("a: 2001-01-01\n", "holds a date"),
        ("a: " + "[" * 5000 + "\n", "nested too deeply|flow sequence"),
        ("#" * (files.MAX_YAML_BYTES + 1), "expected at most 1,048,576 bytes"),
    ):
        path.write_text(text)
        with time_limit(), pytest.raises(ConfigError, match=message):
            read_yaml(path)
        with time_limit(), pytest.raises(ConfigError, match=message):
            fastlora.LoRAConfig.load(path)


def test_large_or_deeply_nested_json_is_refused(tmp_path):
    path = tmp_path / "c.json"
    for text, message in (
        ("[" * 40 + "]" * 40, "nested more than 32 deep"),
        (" " * (files.MAX_JSON_BYTES + 1), "expected at most 16,777,216 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            fastlora.LoRAConfig.load(path)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_arrays_of_a_different_layout_are_refused(tmp_path):
    layout = {"a": ("float32", ("X", 2)), "b": ("int64", ("X",))}
    valid = {"a": np.ones((3, 2), np.float32), "b": np.arange(3)}
    read = files.read_npz(npz(tmp_path / "valid.npz", **valid), layout)
    assert all(np.array_equal(read[name], value) for name, value in valid.items())
    read["a"][0] = 5  # the arrays are writable
    fortran = {**valid, "a": np.asfortranarray(valid["a"])}
    read = files.read_npz(npz(tmp_path / "fortran.npz", **fortran), layout)
    assert np.array_equal(read["a"], valid["a"])
    for change, message in (
        ({"b": np.arange(4)}, r"b: expected int64 \('X',\), got int64 \(4,\)"),
        ({"a": np.ones((3, 3), np.float32)}, r"a: expected float32"),
        ({"a": np.ones((3, 2))}, r"got float64 \(3, 2\)"),
        ({"a": np.ones(3, np.float32)}, r"got float32 \(3,\)"),
        ({"c": np.ones(1)}, "expected the arrays a, b"),
        ({"a": np.array([{}, 1], dtype=object)}, "bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            files.read_npz(npz(tmp_path / "invalid.npz", **{**valid, **change}), layout)
    np.savez_compressed(tmp_path / "c.npz", **valid)
    with pytest.raises(ValueError, match="compressed entries"):
        files.read_npz(tmp_path / "c.npz", layout)


def test_an_array_that_declares_more_than_the_file_holds_is_not_allocated(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(4, np.float32))
    data = (tmp_path / "a.npy").read_bytes().replace(b"(4,), }", b"(9999999999999999,), }", 1)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data[:16] + data[16:].replace(b" " * 15, b"", 1))
    with pytest.raises(ValueError, match="bytes|header"):
        files.read_npz(tmp_path / "x.npz", {"a": ("float32", ("X",))})


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "c.json")  # reading it would block forever
    with time_limit(5), pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "c.json")


@pytest.mark.slow
def test_a_regex_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    fastlora.save_pretrained(_adapted(), tmp_path, include_trainable=False)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without the mark of fastlora's folders
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    endless = r"(\w+\.?)+!"
    monkeypatch.setattr(files.check_regexes, "__defaults__", (0.5,))
    for change in (
        {"target_modules": endless},
        {"rank_pattern": {endless: 4}},
        {"modules_to_save": [endless]},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        model = torch.nn.ModuleDict({"a" * 60: torch.nn.Linear(2, 2)})
        with time_limit(), pytest.raises(CheckpointError, match="takes more than 0.5 s to match"):
            fastlora.from_pretrained(model, tmp_path)


# Where files are written


def test_shard_names_outside_the_folder_are_refused(tmp_path):
    fastlora.save_adapter(_adapted(), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    long = "9" * 300 + ".safetensors"  # found by fuzzing
    invalid = ("../x.safetensors", "/x.safetensors", "..", "a/b.safetensors", "", "x\0.safetensors")
    for name in (*invalid, long):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(
            CheckpointError, match="expected names of .safetensors files in the same"
        ):
            merge_files(index, adapter, tmp_path / "merged", force=True)
    index.write_text(json.dumps({"weight_map": {"w": "none.safetensors"}}))
    with pytest.raises(CheckpointError, match="none.safetensors"):
        merge_files(index, adapter, tmp_path / "merged", force=True)
    assert not (tmp_path / "merged").exists()


def test_symbolic_links_in_a_folder_are_replaced_and_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "adapter"
    outside.write_text("mine")
    folder.mkdir()
    (folder / "adapter_config.json").symlink_to(outside)
    fastlora.save_pretrained(_adapted(), folder, include_trainable=False)
    checkpoint = folder / "last.pt"
    checkpoint.symlink_to(outside)
    atomic_write(checkpoint, b"new")
    assert outside.read_text() == "mine" and checkpoint.read_bytes() == b"new"
    assert not any(path.is_symlink() for path in folder.iterdir())
    config = tmp_path / "c.json"
    config.symlink_to(outside)
    fastlora.LoRAConfig().save(config)
    assert outside.read_text() == "mine" and fastlora.LoRAConfig.load(config)


def _store_tiles(path):
    problem = Problem(64, 64, 64, 4, 2, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLORA_TUNING", str(path))
        row = architecture((9, 0))
        tuning_file.store(
            "Some GPU", problem, tuning_file.Tuned("split", "split", tiles(row, problem))
        )


WRITERS = {
    "tuning.json": _store_tiles,
    "mesh.ply": lambda path: write_mesh(trimesh.creation.box(), path, "ras", {}),
    "ct.nii.gz": lambda path: volumes.save_volume(path, np.zeros((2, 2, 2), np.uint8), np.eye(4)),
    "model.pt2": lambda path: fastlora.export(_adapted(), (torch.randn(2, 2, 8),), path),
    "base.safetensors": lambda path: save_base_model(load_base_model(), path, {}),
    "adapter.safetensors": lambda path: fastlora.save_adapter(_adapted(), path),
    "last.pt": lambda path: checkpointing.write_checkpoint(path, {}),
    "history.json": lambda path: files.write_json(path, []),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_replaces_a_symbolic_link(name, tmp_path):
    outside, target = tmp_path / "outside", tmp_path / name
    outside.write_text("{}")
    target.symlink_to(outside)
    WRITERS[name](target)
    assert outside.read_text() == "{}" and target.is_file() and not target.is_symlink()


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    pipe, link, plain = (tmp_path / name for name in ("pipe", "link", "plain"))
    os.mkfifo(pipe)
    link.symlink_to("pipe")
    for target in (pipe, link):
        with pytest.raises(FileExistsError, match="a device or a pipe"):
            atomic_write_all({plain: b"1", target: b"1"})
        with pytest.raises(CheckpointError, match="cannot write .* a device or a pipe"):
            fastlora.save_adapter(_adapted(), target)
    assert sorted(tmp_path.iterdir()) == [link, pipe] and pipe.is_fifo() and link.is_symlink()


def test_a_model_card_with_a_value_that_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_base_model(load_base_model(), tmp_path / "base.safetensors", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_permissions_of_a_replaced_file_are_kept(tmp_path):
    path = tmp_path / "adapter.safetensors"
    fastlora.save_adapter(_adapted(), path)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # the mode of a new file under the umask
    for mode in (0o640, 0o444):
        path.chmod(mode)
        fastlora.save_adapter(_adapted(), path)
        assert path.stat().st_mode & 0o777 == mode


def test_a_private_file_is_private_while_it_is_written(tmp_path):
    path, modes = tmp_path / "a.bin", []
    for private in (0o600, 0o400):
        path.touch()
        path.chmod(private)
        atomic_write(path, lambda file: modes.append(os.stat(file.name).st_mode & 0o077))
        assert modes.pop() == 0 and path.stat().st_mode & 0o777 == private


def test_every_file_is_on_the_disk_before_the_first_is_renamed(tmp_path, monkeypatch):
    order = []

    def record(name, function):
        def call(*arguments):
            order.append(name)
            return function(*arguments)

        monkeypatch.setattr(os, name, call)

    record("fsync", os.fsync)
    record("replace", os.replace)
    atomic_write_all({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert order == ["fsync", "fsync", "replace", "replace", "fsync"]  # the last is the folder's
    order.clear()
    with files.replaced_folder(tmp_path / "folder") as new:
        (new / "a").write_text("1")
    assert order == ["fsync", "fsync", "replace", "fsync"]


def test_readers_and_writers_of_one_file_see_complete_files_only(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, bytes(100_000))

    def write_and_read(number):
        atomic_write(path, bytes([number]) * 100_000)
        data = path.read_bytes()
        return len(data) == 100_000 and len(set(data)) == 1

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write_and_read, range(200)))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["block", "second rename"])
def test_a_folder_is_replaced_as_a_whole_or_kept(tmp_path, monkeypatch, failing):
    folder = tmp_path / "folder"
    with files.replaced_folder(folder) as new:
        (new / "a").write_text("old")
        (new / "sub").mkdir()
    with files.replaced_folder(folder) as new:
        (new / "a").write_text("new")
    assert sorted(p.name for p in folder.iterdir()) == ["a"]
    assert (folder / "a").read_text() == "new"

    def replace(source, target, rename=os.replace):
        if Path(source).name == "new":
            raise OSError("full")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="full"), files.replaced_folder(folder) as new:
        (new / "a").write_text("newer")
        if failing == "block":
            raise OSError("full")
    assert (folder / "a").read_text() == "new" and list(tmp_path.iterdir()) == [folder]


def test_a_replaced_folder_keeps_the_permissions_of_all_it_replaces(tmp_path):
    folder, modes = tmp_path / "folder", {".": 0o2750, "sub": 0o700, "sub/a": 0o600, "b": 0o664}

    def write():
        with files.replaced_folder(folder) as new:
            assert new.parent.stat().st_mode & 0o077 == 0  # nobody else reads it meanwhile
            (new / "sub").mkdir()
            for name in ("sub/a", "b", "c"):
                (new / name).write_text(name)

    plain = tmp_path / "plain"
    plain.mkdir()
    write()
    assert folder.stat().st_mode == plain.stat().st_mode  # the mode of a new folder under the umask
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    modes["c"] = (folder / "c").stat().st_mode & 0o7777
    write()
    assert {name: (folder / name).stat().st_mode & 0o7777 for name in modes} == modes


def test_a_link_to_a_folder_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").mkdir(0o700)
    (tmp_path / "mine" / "a").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    with files.replaced_folder(tmp_path / "link") as new:
        (new / "a").write_text("new")
    assert (tmp_path / "mine" / "a").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link" / "a").read_text() == "new"
    assert (tmp_path / "link").stat().st_mode & 0o777 != 0o700  # a link has no mode to keep


def test_files_of_one_write_change_together_or_not_at_all(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("old")

    def fail(file):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        atomic_write_all({one: b"new", two: fail})
    assert one.read_text() == "old" and list(tmp_path.iterdir()) == [one]


def test_complex_weights_are_refused(tmp_path):
    model = _adapted()
    state = {
        name: value.to(torch.complex64)
        for name, value in fastlora.get_lora_state_dict(model).items()
    }
    with pytest.raises(CheckpointError, match="expected real numbers, got torch.complex64"):
        fastlora.load_lora_state_dict(model, state)


# Volumes


def nifti(path, shape, kind=2, offset=352.0, body=b"\0" * 8):
    header = bytearray(nib.Nifti1Header().binaryblock)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", header, 70, kind, {2: 8, 64: 64}[kind])
    struct.pack_into("<f", header, 108, offset)
    header[344:348] = b"n+1\0"
    data = bytes(header) + b"\0" * 4 + body
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_declared_sizes_of_a_volume_are_checked(tmp_path, name, monkeypatch):
    path = tmp_path / name
    monkeypatch.setattr(np, "asanyarray", None)  # the voxels must not be read
    for shape, options, message in (
        ((32767, 32767, 32767), {}, "expected at most 536,870,912 voxels"),
        ((500, 500, 500), {"kind": 64}, "declares 1,000,000,352 bytes, and the file holds at most"),
        ((2, 2, 2), {"offset": 3e9}, "the file holds at most"),
        ((-5, 2, 2), {}, "voxels|dim"),
    ):
        nifti(path, shape, **options)
        with pytest.raises(DataError, match=message):
            volumes.load_volume(path)


def test_an_affine_that_drops_an_axis_is_refused(tmp_path):  # found by fuzzing
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), np.eye(4))
    image.header["sform_code"], image.header["srow_x"] = 1, 0
    data = bytearray(image.to_bytes())
    struct.pack_into("<12f", data, 280, *[0.0] * 12)
    struct.pack_into("<h", data, 254, 1)
    (tmp_path / "v.nii").write_bytes(data)
    with pytest.raises(DataError, match="v.nii: expected a readable NIfTI file, got Orient"):
        volumes.load_volume(tmp_path / "v.nii")


def test_labels_that_do_not_fit_int32_are_refused(tmp_path):
    for value in (1e20, float("nan"), 0.5, -(2.0**40)):
        nib.save(nib.Nifti1Image(np.full((2, 2, 2), value), np.eye(4)), tmp_path / "l.nii")
        with pytest.raises(DataError, match="integer labels"):
            volumes.load_labels(tmp_path / "l.nii")
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), 1e300), np.eye(4)), tmp_path / "l.nii")
    with pytest.raises(DataError, match="expected finite values"):
        volumes.load_volume(tmp_path / "l.nii")


def test_a_csv_that_is_not_a_table_is_refused(valid):
    folder, table = valid
    reader = table["find_cases meta.csv"]
    for data in (
        b"image_id;split\n\xff\xfe;x\n",
        b"a;b\n1;2;3;4\n",
        b"image_id;s\n" + b"x" * 200_000,
    ):
        (folder / reader.file).write_bytes(data)
        with pytest.raises(DataError, match="meta.csv"):
            reader.read(folder / reader.file)
    (folder / reader.file).write_bytes(reader.valid)
