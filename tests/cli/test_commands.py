"""The command `fastlora`: what it prints and writes; invalid input prints one line and writes no file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import LoRAConfig
from fastlora.cli import commands as cli
from fastlora.cli.convert import convert, difference_norm, read_adapter, update_norm
from fastlora.cli.merge import merge_files
from fastlora.io.adapter_state import LayerState
from tests.support.models import Decoder, randomise_adapters


def decoder(dtype=torch.float32):
    torch.manual_seed(7)
    return Decoder().to(dtype)


def adapted(rank=4, use_rslora=False, head=False, seed=1, dtype=torch.float32, dropout=0.0):
    model = decoder(dtype)
    config = LoRAConfig(
        ["to_qkv", "to_out"],
        rank=rank,
        alpha=12.0,
        use_rslora=use_rslora,
        dropout=dropout,
        rank_pattern={"to_out": 2},
        alpha_pattern={"to_out": 6.0},
    )
    fastlora.inject_lora(model, config)
    randomise_adapters(model, seed)
    fastlora.freeze_base_params(model)
    if head:
        model.out_layer.requires_grad_(True)
        nn.init.normal_(model.out_layer.weight)
    return model.eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base file, an adapter file and the same adapter as PEFT's folder."""
    monkeypatch.chdir(tmp_path)
    save_file(decoder().state_dict(), "base.safetensors", {"format": "pt", "note": "kept"})
    fastlora.save_adapter(adapted(head=True), "adapter.safetensors")
    fastlora.save_pretrained(adapted(head=True), "peft")
    state = fastlora.get_lora_state_dict(uniform())
    save_file({key: value.clone() for key, value in state.items()}, "loralib.safetensors")
    return tmp_path


def uniform():
    """An adapter with one alpha in all layers."""
    model = decoder()
    fastlora.inject_lora(model, LoRAConfig(["to_"], rank=4, alpha=12.0))
    randomise_adapters(model)
    fastlora.freeze_base_params(model)
    return model.eval()


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of one command."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def listing():
    return {str(p): p.stat().st_mtime_ns for p in Path(".").rglob("*")}


# inspect


@pytest.mark.parametrize(
    "source", ["adapter.safetensors", "peft", "peft/adapter_model.safetensors"]
)
def test_inspect_shows_what_the_layers_are(folder, capsys, source):
    code, out, err = run(capsys, "inspect", source)
    assert (code, err) == (0, "")
    assert "4 layers, 2 other tensors" in out and "out_layer.weight  5x16  float32" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("blocks.1.attn.to_out"))
    layer = adapted().blocks[1].attn.to_out
    product = layer.lora_B.double() @ layer.lora_A.double()
    assert row[1:8] == ["linear", "2x16", "16x2", "float32", "2", "6", "3"]
    norm = product.norm().item()
    assert [float(x) for x in row[8:]] == pytest.approx([norm, 3 * norm], rel=1e-3)


def test_inspect_as_json_and_under_rslora(folder, capsys):
    fastlora.save_adapter(adapted(use_rslora=True), "rs.safetensors")
    _, out, _ = run(capsys, "inspect", "rs.safetensors", "--json")
    shown = json.loads(out)
    assert shown["format"] == "fastlora" and shown["others"] == []
    first = shown["layers"][0]
    assert (first["layer"], first["r"], first["alpha"]) == ("blocks.0.attn.to_out", 2, 6.0)
    assert first["use_rslora"] and first["scaling"] == pytest.approx(6 / 2**0.5)
    assert first["|dW|"] == pytest.approx(first["scaling"] * first["|BA|"])
    _, out, _ = run(capsys, "inspect", "rs.safetensors")
    assert out.count("  rsLoRA\n") == 4


def test_layers_are_listed_in_the_order_of_their_numbers(folder, capsys):
    names = ["m.10", "m.2", "m.x", "m", "m." + "9" * 5000]
    state = {f"{n}.lora_{k}": torch.ones(1, 1) for n in names for k in "AB"}
    save_file(state, "numbers.safetensors")
    _, out, _ = run(capsys, "inspect", "numbers.safetensors")
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        "m",
        "m.x",
        "m.2",
        "m.10",
        names[-1],
    ]


def test_inspect_a_file_without_alpha(folder, capsys):
    code, out, _ = run(capsys, "inspect", "loralib.safetensors")
    assert code == 0 and ": loralib, 4 layers" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("blocks.0"))
    assert row[6:8] == ["?", "?"] and row[9] == "?"
    assert (
        json.loads(run(capsys, "inspect", "loralib.safetensors", "--json")[1])["layers"][0]["alpha"]
        is None
    )


@pytest.mark.parametrize(
    ("value", "alpha"), [(float("nan"), 6.0), (float("inf"), 6.0), (1.0, 1e308)]
)
def test_inspect_prints_json_if_the_values_are_not_finite(folder, capsys, value, alpha):
    model = adapted()
    layers = dict(fastlora.named_lora_layers(model))
    layer = layers["blocks.0.attn.to_out"]
    with torch.no_grad():
        layer.lora_A.fill_(value)
        layer.lora_B.fill_(value)
    layer.alpha = alpha
    fastlora.save_adapter(model, "spoiled.safetensors")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    code, out, _ = run(capsys, "inspect", "spoiled.safetensors", "--json")
    shown = {row["layer"]: row for row in json.loads(out, parse_constant=refuse)["layers"]}
    assert code == 0 and shown["blocks.0.attn.to_out"]["|dW|"] is None
    assert (shown["blocks.0.attn.to_out"]["|BA|"] is None) == (value != 1.0)
    assert shown["blocks.1.attn.to_out"]["|dW|"] > 0
    row = next(
        r
        for r in run(capsys, "inspect", "spoiled.safetensors")[1].splitlines()
        if ".0.attn.to_out" in r
    )
    assert row.split()[-1] in ("nan", "inf")  # the table for people shows which


# merge


@pytest.mark.parametrize("source", ["adapter.safetensors", "peft"])
def test_merged_files_equal_merged_models(folder, capsys, source):
    code, out, err = run(capsys, "merge", "base.safetensors", source, "out.safetensors")
    assert (code, err) == (0, "")
    assert "merged 4 layers, replaced 2 other tensors; rounding to float32 lost at most" in out
    expected = fastlora.merged_model(adapted(head=True)).state_dict()
    got = load_file("out.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    with safe_open("out.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_merging_rounds_once_and_prints_the_loss(folder, capsys, dtype):
    save_file(decoder(dtype).state_dict(), "base.safetensors")
    model = adapted(dtype=dtype).requires_grad_(False)
    fastlora.save_adapter(model, "a.safetensors")
    _, out, _ = run(capsys, "merge", "base.safetensors", "a.safetensors", "out.safetensors")
    expected = fastlora.merged_model(model).state_dict()
    got = load_file("out.safetensors")
    assert all(got[k].dtype == dtype and torch.equal(got[k], expected[k]) for k in got)
    shares = []
    for path, layer in fastlora.named_lora_layers(model):
        wide = torch.promote_types(dtype, torch.float32)
        exact = layer.original_linear.weight.to(wide) + layer.scaling * (
            layer.lora_B.to(wide) @ layer.lora_A.to(wide)
        )
        change = exact - layer.original_linear.weight.to(wide)
        shares.append(float((got[f"{path}.weight"].to(wide) - exact).norm() / change.norm()))
    printed = float(re.search(r"lost at most (\S+)%", out)[1]) / 100
    assert printed == pytest.approx(max(shares), rel=0.06, abs=1e-6)
    assert (printed > 1e-4) == (dtype != torch.float64)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "dtype", "message"),
    [
        ("blocks.1.attn.to_out.lora_B", float("nan"), torch.float32, "lora_B has values that are"),
        ("blocks.1.attn.to_out.lora_A", float("inf"), torch.float32, "lora_A has values that are"),
        ("blocks.1.attn.to_out.lora_B", 1e7, torch.float16, "not finite in torch.float16 (out of"),
        ("out_layer.weight", float("nan"), torch.float32, "not all finite in F32"),
        ("out_layer.weight", 1e6, torch.float16, "not all finite in F16"),
    ],
)
def test_what_is_not_finite_is_not_merged(folder, capsys, key, value, dtype, message, sharded):
    save_file(decoder(dtype).state_dict(), "base.safetensors")
    base, out = "base.safetensors", "out.safetensors"
    if sharded:
        base, out = "m.index.json", "merged"
        index = {"weight_map": dict.fromkeys(decoder().state_dict(), "base.safetensors")}
        Path(base).write_text(json.dumps(index))
    with safe_open("adapter.safetensors", "pt") as opened:
        metadata = opened.metadata()
    state = load_file("adapter.safetensors")
    state[key].view(-1)[0] = value
    save_file(state, "adapter.safetensors", metadata)
    before = listing()
    code, printed, err = run(capsys, "merge", base, "adapter.safetensors", out)
    assert (code, printed, err.count("\n")) == (1, "", 1)
    assert message in err and key.removesuffix(".lora_A").removesuffix(".lora_B") in err
    assert listing() == before


def test_a_base_that_is_not_finite_is_merged_with_a_note(folder, capsys):
    expected = fastlora.merged_model(adapted(head=True)).state_dict()
    state, key = decoder().state_dict(), "blocks.0.attn.to_qkv.weight"
    for tensors in (state, expected):
        tensors[key][2, 3] = float("inf")
    save_file(state, "base.safetensors")
    code, out, err = run(
        capsys, "merge", "base.safetensors", "adapter.safetensors", "out.safetensors"
    )
    assert code == 0 and "nan" not in out
    assert err == f"fastlora: note: {key}: 1 values of the base are not finite, and stay so\n"
    got = load_file("out.safetensors")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_converting_what_is_not_finite_prints_a_note_and_diff_does_not_call_it_equal(
    folder, capsys
):
    model = adapted()
    with torch.no_grad():
        model.blocks[0].attn.to_qkv.lora_B[0, 0] = float("nan")
    fastlora.save_adapter(model, "nan.safetensors")
    code, _, err = run(capsys, "convert", "nan.safetensors", "p", "--to", "peft")
    assert code == 0 and "1 tensors have values that are not finite" in err
    assert "blocks.0.attn.to_qkv.lora_B" in err
    with torch.no_grad():
        for _, layer in fastlora.named_lora_layers(model):
            layer.lora_B.zero_()
    fastlora.save_adapter(model, "zero.safetensors")
    for pair in (("zero.safetensors", "p"), ("p", "zero.safetensors"), ("p", "nan.safetensors")):
        code, out, _ = run(capsys, "diff", *pair)
        assert code == 1 and out.endswith("they differ\n")


def test_a_sharded_base_is_merged_shard_by_shard(folder, capsys):
    index = json.loads(sharded_base().read_text())
    halves = ("one.safetensors", "two.safetensors")
    arguments = ("merge", "sharded/model.safetensors.index.json", "adapter.safetensors", "merged")
    assert run(capsys, *arguments)[0] == 0
    assert sorted(os.listdir("merged")) == ["model.safetensors.index.json", *halves]
    expected = fastlora.merged_model(adapted(head=True)).state_dict()
    got = load_file("merged/one.safetensors") | load_file("merged/two.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert json.loads(Path("merged/model.safetensors.index.json").read_text()) == index
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "exists; --force replaces it" in err
    assert run(capsys, *arguments, "--force")[0] == 0


@pytest.mark.parametrize(
    "names", [["../x.safetensors"], ["/etc/x.safetensors"], ["x.bin"], [], [3], [["a"]]]
)
def test_an_index_may_name_only_files_in_its_folder(folder, capsys, names):
    index = {"weight_map": {f"k{i}": name for i, name in enumerate(names)}}
    Path("m.index.json").write_text(json.dumps(index))
    before = listing()
    code, _, err = run(capsys, "merge", "m.index.json", "adapter.safetensors", "merged")
    assert code == 1 and err.count("\n") == 1 and "m.index.json" in err
    assert listing() == before


def test_what_does_not_fit_is_named_and_nothing_is_written(folder, capsys):
    other = Decoder(blocks=1).state_dict()
    other["blocks.0.attn.to_out.weight"] = torch.zeros(16, 4)
    other["out_layer.weight"] = other["out_layer.weight"].int()
    save_file(other, "other.safetensors")
    before = listing()
    code, out, err = run(
        capsys, "merge", "other.safetensors", "adapter.safetensors", "o.safetensors"
    )
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "blocks.0.attn.to_out.weight: expected shape (16, 16), got (16, 4)" in err
    assert "no blocks.1.attn.to_qkv.weight (nearest: " in err and "and 1 more" in err
    assert listing() == before
    save_file({k: v for k, v in other.items() if k != "out_layer.weight"}, "other.safetensors")
    state = decoder().state_dict()
    state["out_layer.weight"] = state["out_layer.weight"].int()
    save_file(state, "other.safetensors")
    _, _, err = run(capsys, "merge", "other.safetensors", "adapter.safetensors", "o.safetensors")
    assert "out_layer.weight: expected one of F16, BF16, F32, F64, I64, got I32" in err


def test_alpha_can_be_given_where_the_file_does_not_store_it(folder, capsys):
    arguments = ("merge", "base.safetensors", "loralib.safetensors", "out.safetensors")
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "pass it with --alpha" in err and not Path("out.safetensors").exists()
    assert run(capsys, *arguments, "--alpha", 12)[0] == 0
    expected = fastlora.merged_model(uniform()).state_dict()
    got = load_file("out.safetensors")
    assert all(torch.equal(got[key], expected[key]) for key in got)
    code, _, err = run(
        capsys, "merge", "base.safetensors", "peft", "x.safetensors", "--alpha", "12"
    )
    assert code == 1 and "--alpha: peft already stores alpha" in err


def test_a_full_disk_leaves_nothing_half_written(folder, capsys, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    Path("m.index.json").write_text(json.dumps({"weight_map": {"k": "base.safetensors"}}))
    before = listing()
    monkeypatch.setattr("shutil.copyfile", full)
    for base, out in (("base.safetensors", "out.safetensors"), ("m.index.json", "merged")):
        code, _, err = run(capsys, "merge", base, "adapter.safetensors", out)
        assert code == 1 and "No space left" in err and err.count("\n") == 1
        assert listing().keys() == before.keys()


@pytest.mark.parametrize("route", ["same", "relative", "symbolic link", "hard link"])
def test_the_file_of_the_base_is_never_a_target(folder, capsys, route):
    target = Path("other.safetensors")
    if route == "same":
        target = Path("base.safetensors")
    elif route == "relative":
        target = Path("../") / folder.name / "base.safetensors"
    elif route == "symbolic link":
        target.symlink_to("base.safetensors")
    else:
        target.hardlink_to("base.safetensors")
    before = Path("base.safetensors").read_bytes()
    arguments = ("merge", "base.safetensors", "adapter.safetensors", target, "--force")
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "the next merge would merge the adapter again" in err
    assert Path("base.safetensors").read_bytes() == before


def sharded_base(name="sharded"):
    state = decoder().state_dict()
    keys = list(state)
    halves = {"one.safetensors": keys[::2], "two.safetensors": keys[1::2]}
    Path(name).mkdir()
    for file, part in halves.items():
        save_file({key: state[key] for key in part}, f"{name}/{file}", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: n for n, part in halves.items() for k in part}}
    Path(name, "model.safetensors.index.json").write_text(json.dumps(index))
    return Path(name, "model.safetensors.index.json")


@pytest.mark.parametrize("route", ["same", "link to the folder", "parent", "links to the files"])
def test_no_file_of_a_sharded_base_is_in_the_target(folder, capsys, route):
    index = sharded_base()
    target = Path("other")
    if route == "same":
        target = Path("x/../sharded")
        Path("x").mkdir()
    elif route == "link to the folder":
        target.symlink_to("sharded")
    elif route == "parent":
        target = Path(".")
    else:  # the shards lie in the target, the base has links to them
        target.mkdir()
        for file in ("one.safetensors", "two.safetensors"):
            Path("sharded", file).rename(target / file)
            Path("sharded", file).symlink_to(Path("../other", file))
    before = listing()
    for base in (index, index.parent):
        code, _, err = run(capsys, "merge", base, "adapter.safetensors", target, "--force")
        assert code == 1 and "the next merge would merge the adapter again" in err
        assert listing() == before


_KILLED = """
import os, shutil, sys
from fastlora import files
from fastlora.cli import commands, merge

def killed_before(step, arguments):
    calls = 0
    def counted(function):
        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls == step:
                os._exit(9)
            return function(*given, **named)
        return call
    os.replace, shutil.copyfile = counted(os.replace), counted(shutil.copyfile)
    files._sync, merge._merge_into = counted(files._sync), counted(merge._merge_into)
    os._exit(commands.main(arguments))

for step in range(1, 14):
    for target in ("new", "old"):
        child = os.fork()
        if child == 0:
            killed_before(step, [*sys.argv[1:], f"{target}{step}", "--force"])
        print(target, step, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_merge_killed_anywhere_and_run_again_merges_every_shard_once(folder, capsys):
    index = sharded_base()
    expected = fastlora.merged_model(adapted(head=True)).state_dict()
    base = {path: path.read_bytes() for path in index.parent.iterdir()}
    for step in range(1, 14):
        shutil.copytree("sharded", f"old{step}")
    environment = os.environ | {"PYTHONPATH": str(Path(fastlora.__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", _KILLED, "merge", str(index), "adapter.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    codes = [line.split() for line in done.stdout.splitlines() if line.startswith(("new ", "old "))]
    assert len(codes) == 26 and {code for *_, code in codes} == {"0", "9"}
    contents = {"old": 0, "missing": 0, "merged": 0}
    for name, step, code in codes:
        target = Path(name + step)
        got = {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
        whole = got.keys() == expected.keys() and len(os.listdir(target)) == 3
        if not target.exists():
            contents["missing"] += 1
        elif whole and all(torch.equal(got[key], expected[key]) for key in got):
            contents["merged"] += 1
        else:
            assert name == "old" and {p.name: p.read_bytes() for p in target.iterdir()} == {
                path.name: data for path, data in base.items()
            }
            contents["old"] += 1
        assert code == "9" or whole
    assert contents == {"old": 10, "missing": 11, "merged": 5}
    assert {path: path.read_bytes() for path in index.parent.iterdir()} == base


def test_force_replaces_a_folder_of_merged_files_only(folder, capsys):
    index = sharded_base()
    arguments = ("merge", index, "adapter.safetensors", "merged")
    assert run(capsys, *arguments)[0] == 0
    Path("merged/one.safetensors").write_bytes(b"old")
    assert "exists; --force replaces it" in run(capsys, *arguments)[2]
    assert run(capsys, *arguments, "--force")[0] == 0
    assert len(load_file("merged/one.safetensors")) > 1
    Path("merged/thesis.tex").write_text("mine")
    before = listing()
    code, _, err = run(capsys, *arguments, "--force")
    assert code == 1 and "holds thesis.tex, which a merge does not write and would remove" in err
    assert listing() == before


# convert


@pytest.mark.parametrize("use_rslora", [False, True])
def test_to_peft_and_back(folder, capsys, use_rslora):
    source = adapted(head=True, use_rslora=use_rslora)
    fastlora.save_adapter(source, "a.safetensors")
    assert run(capsys, "convert", "a.safetensors", "p", "--to", "peft")[0] == 0
    model = decoder()
    fastlora.from_pretrained(model, "p")
    x = torch.randn(3, 7, 8)
    assert torch.equal(model.eval()(x), source(x))
    assert [layer.alpha for _, layer in fastlora.named_lora_layers(model)] == [12.0, 6.0] * 2
    assert run(capsys, "convert", "p", "b.safetensors", "--to", "fastlora")[0] == 0
    again = adapted(head=True, use_rslora=use_rslora, seed=9)
    fastlora.load_adapter(again, "b.safetensors")
    assert torch.equal(again(x), source(x))
    assert run(capsys, "diff", "a.safetensors", "b.safetensors")[0] == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_loads_a_converted_folder(folder, capsys):
    peft = pytest.importorskip("peft")
    assert run(capsys, "convert", "adapter.safetensors", "p", "--to", "peft")[0] == 0
    theirs = peft.PeftModel.from_pretrained(decoder(), "p").eval()
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(theirs(x), adapted(head=True)(x))


def test_loralib_both_ways_with_alpha_given(folder, capsys):
    arguments = ("convert", "loralib.safetensors", "a.safetensors", "--to", "fastlora")
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "pass it with --alpha" in err
    assert run(capsys, *arguments, "--alpha", 12)[0] == 0
    model = uniform()
    fastlora.load_adapter(model, "a.safetensors")
    back = ("convert", "a.safetensors", "l.safetensors", "--to", "loralib")
    code, _, err = run(capsys, *back)
    assert code == 1 and "do not store it" in err and "confirm it with --alpha 12" in err
    code, _, err = run(capsys, *back, "--alpha", "16")
    assert code == 1 and "lora_alpha=12, not 16" in err
    assert not Path("l.safetensors").exists()
    assert run(capsys, *back, "--alpha", "12")[0] == 0
    old, new = load_file("loralib.safetensors"), load_file("l.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    code, _, err = run(
        capsys,
        "convert",
        "adapter.safetensors",
        "x.safetensors",
        "--to",
        "loralib",
        "--alpha",
        "12",
    )
    assert code == 1 and "2 different values (6 to 12)" in err
    code, _, err = run(
        capsys, "convert", "a.safetensors", "x.safetensors", "--to", "fastlora", "--alpha", "12"
    )
    assert code == 1 and "already stores alpha" in err


def test_different_dropouts_print_a_note(folder, capsys):
    model = adapted(dropout=0.25)
    model.blocks[0].attn.to_out.dropout = 0.5
    fastlora.save_adapter(model, "a.safetensors")
    code, _, err = run(capsys, "convert", "a.safetensors", "p", "--to", "peft")
    assert code == 0 and "note: layers have the dropouts [0.25, 0.5]" in err
    assert json.loads(Path("p/adapter_config.json").read_text())["lora_dropout"] == 0.5


@pytest.mark.parametrize("format", ["fastlora", "peft"])
def test_nothing_is_replaced_without_force(folder, capsys, format):
    target = {"fastlora": "adapter.safetensors", "peft": "peft"}[format]
    source = {"fastlora": "peft", "peft": "adapter.safetensors"}[format]
    before = listing()
    code, _, err = run(capsys, "convert", source, target, "--to", format)
    assert code == 1 and "exists; --force replaces it" in err and listing() == before
    assert run(capsys, "convert", source, target, "--to", format, "--force")[0] == 0


def test_a_target_of_the_wrong_kind(folder, capsys):
    for source, target, to, message in (
        (
            "adapter.safetensors",
            "base.safetensors",
            "peft",
            "folder: cannot create base.safetensors",
        ),
        ("peft", "peft", "fastlora", "is a folder; expected the name of a file"),
        ("adapter.safetensors", "none/x.safetensors", "fastlora", "cannot write"),
        ("adapter.safetensors", "base.safetensors/x", "peft", "folder: cannot create"),
    ):
        code, _, err = run(capsys, "convert", source, target, "--to", to, "--force")
        assert code == 1 and message in err and err.count("\n") == 1
    for base, target, message in (
        ("base.safetensors", "peft", "is a folder; expected a file to write to"),
        ("m.index.json", "base.safetensors", "is a file; this base needs a folder"),
    ):
        Path("m.index.json").write_text(json.dumps({"weight_map": {"k": "base.safetensors"}}))
        code, _, err = run(capsys, "merge", base, "adapter.safetensors", target, "--force")
        assert code == 1 and message in err


def test_what_pefts_format_cannot_store_is_refused(folder, capsys):
    layer = fastlora.LoRALinear(nn.Linear(4, 4), 2)
    fastlora.save_adapter(layer, "layer.safetensors")
    code, _, err = run(capsys, "convert", "layer.safetensors", "p", "--to", "peft")
    assert code == 1 and "the model itself is the adapted layer" in err
    assert "(the model)" in run(capsys, "inspect", "layer.safetensors")[1]
    model = adapted()
    model.scale = nn.Parameter(torch.ones(1))
    fastlora.save_adapter(model, "own.safetensors")
    assert (
        "scale belongs to the model itself, which PEFT's format cannot store"
        in run(capsys, "convert", "own.safetensors", "p", "--to", "peft")[2]
    )
    model = adapted()
    model.blocks[0].attn.to_out.original_linear.bias.requires_grad_(True)
    fastlora.save_adapter(model, "inner.safetensors")
    code, _, err = run(capsys, "convert", "inner.safetensors", "p", "--to", "peft")
    assert code == 1 and "it contains or is part of the adapted blocks.0.attn.to_out" in err
    assert not Path("p").exists()


# diff


def test_diff_compares_updates_and_not_factors(folder, capsys):
    state = load_file("adapter.safetensors")
    with safe_open("adapter.safetensors", "pt") as opened:
        metadata = opened.metadata()
    for key in state:
        state[key] = state[key] * (4 if key.endswith("A") else 0.25 if key.endswith("B") else 1)
    save_file(state, "same.safetensors", metadata)
    code, out, err = run(capsys, "diff", "peft", "same.safetensors")
    assert (code, err) == (0, "") and out.endswith("the same\n")
    state["blocks.0.attn.to_qkv.lora_B"] *= 1.5
    save_file(state, "other.safetensors", metadata)
    code, out, _ = run(capsys, "diff", "peft", "other.safetensors")
    assert code == 1 and out.endswith("they differ\n")
    row = next(line.split() for line in out.splitlines() if line.startswith("blocks.0.attn.to_qkv"))
    one, two, difference = map(float, row[1:4])
    assert two == pytest.approx(1.5 * one, rel=1e-3)
    assert difference == pytest.approx(0.5 * one, rel=1e-3)
    assert float(row[4]) == pytest.approx(1 / 3, rel=0.02)
    assert run(capsys, "diff", "peft", "other.safetensors", "--tolerance", "0.4")[0] == 0


def test_diff_of_heads_layers_and_alphas(folder, capsys):
    model = adapted(head=True)
    with torch.no_grad():
        model.out_layer.bias += 1
    fastlora.save_adapter(model, "head.safetensors")
    code, out, _ = run(capsys, "diff", "adapter.safetensors", "head.safetensors")
    assert code == 1 and re.search(r"^out_layer.bias .* 2.236 ", out, flags=re.M)
    fastlora.save_adapter(adapted(), "none.safetensors")
    code, out, _ = run(capsys, "diff", "adapter.safetensors", "none.safetensors")
    assert code == 1 and out.count("only in A") == 2
    fastlora.save_adapter(uniform(), "uniform.safetensors")
    assert run(capsys, "diff", "loralib.safetensors", "uniform.safetensors")[0] == 2
    assert (
        run(capsys, "diff", "loralib.safetensors", "uniform.safetensors", "--alpha", "12")[0] == 0
    )
    assert run(capsys, "diff", "loralib.safetensors", "uniform.safetensors", "--alpha", "6")[0] == 1
    small = Decoder(blocks=1)
    fastlora.inject_lora(small, ["to_qkv"])
    fastlora.save_adapter(small, "small.safetensors")
    code, out, _ = run(capsys, "diff", "small.safetensors", "none.safetensors")
    assert code == 1 and out.count("only in B") == 3
    wide = Decoder(width=8)
    fastlora.inject_lora(wide, ["to_qkv"])
    fastlora.save_adapter(wide, "wide.safetensors")
    code, _, err = run(capsys, "diff", "wide.safetensors", "none.safetensors")
    assert code == 2 and "blocks.0.attn.to_qkv: the layers have different sizes" in err
    wide.out_layer.weight.requires_grad_(True)


def test_norms_agree_with_the_dense_products():
    def linear(a, b, alpha):
        return LayerState("linear", {"lora_A": a, "lora_B": b}, alpha)

    for n, k, r in ((7, 5, 2), (3, 4, 8), (1, 1, 1)):
        a = linear(torch.randn(r, k), torch.randn(n, r), 2.0 * r)
        b = linear(torch.randn(3, k), torch.randn(n, 3), 3.0)
        dense = [x.scaling * x.lora_b.double() @ x.lora_a.double() for x in (a, b)]
        assert 2 * update_norm(a) == pytest.approx(dense[0].norm().item())
        assert difference_norm(a, b) == pytest.approx((dense[0] - dense[1]).norm().item())
        assert difference_norm(a, a) <= 1e-14 * dense[0].norm().item()


# invalid input


def hostile():
    """name -> a function that writes an input that must be refused."""
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    good = {"m.lora_A": a, "m.lora_B": b}

    def file(tensors, metadata=None):
        return lambda path: save_file(tensors, path, metadata)

    def described(layers):
        return file(good, {"fastlora": json.dumps({"version": 1, "layers": layers})})

    def text(content):
        return lambda path: Path(path).write_bytes(content)

    deep = {"fastlora": "[" * 100_000}
    fine = {"rank": 2, "alpha": 4.0, "dropout": 0.0}
    return {
        "missing": lambda path: None,
        "empty": text(b""),
        "text": text(b"no safetensors at all, just text"),
        "huge header": text((2**62).to_bytes(8, "little") + b"{}"),
        "wrong offsets": text(
            (67).to_bytes(8, "little")
            + b'{"m.lora_A":{"dtype":"F32","shape":[2,4],"data_offsets":[0,9999]}}'.ljust(67)
        ),
        "no adapter": file({"m.weight": a}),
        "A alone": file({"m.lora_A": a}),
        "B alone": file({"m.lora_B": b}),
        "not a pair": file({"m.lora_A": a, "m.lora_B": torch.ones(4, 3)}),
        "one dimension": file({"m.lora_A": torch.ones(4), "m.lora_B": torch.ones(4)}),
        "no rank": file({"m.lora_A": torch.ones(0, 4), "m.lora_B": torch.ones(4, 0)}),
        "integers": file({"m.lora_A": a.int(), "m.lora_B": b.int()}),
        "dora": file(good | {"m.lora_magnitude_vector": torch.ones(4)}),
        "peft without config": file({"base_model.model.m.lora_A.weight": a}),
        "metadata no json": file(good, {"fastlora": "{"}),
        "metadata too deep": file(good, deep),
        "metadata a list": file(good, {"fastlora": "[]"}),
        "rank differs": described({"m": fine | {"rank": 3}}),
        "rank a string": described({"m": fine | {"rank": "2"}}),
        "alpha a string": described({"m": fine | {"alpha": "x"}}),
        "alpha too large": described({"m": fine | {"alpha": 10**400}}),
        "alpha infinite": described({"m": fine | {"alpha": float("inf")}}),
        "alpha missing": described({"m": {"rank": 2}}),
        "rslora a number": described({"m": fine | {"use_rslora": 1}}),
        "another layer described": described({"m\x1b[2J\ud800": fine}),
        "no layers": described({"n": fine, "m": fine}),
    }


@pytest.mark.parametrize("name", hostile())
def test_invalid_adapters_print_one_line_and_write_nothing(folder, capsys, name):
    hostile()[name]("invalid.safetensors")
    before = listing()
    for arguments in (
        ("inspect", "invalid.safetensors"),
        ("merge", "base.safetensors", "invalid.safetensors", "out.safetensors"),
        ("convert", "invalid.safetensors", "out", "--to", "peft"),
        ("diff", "adapter.safetensors", "invalid.safetensors"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2 if arguments[0] == "diff" else 1, ""), arguments
        assert err.startswith("fastlora: error: ") and err.count("\n") == 1
        assert err.strip().isprintable()
        assert listing() == before


def test_a_base_that_is_damaged_or_missing(folder, capsys):
    Path("invalid.safetensors").write_bytes(Path("base.safetensors").read_bytes()[:-1])
    for base in ("invalid.safetensors", "none.safetensors", "none.index.json", "peft"):
        code, out, err = run(capsys, "merge", base, "adapter.safetensors", "out.safetensors")
        assert code == 1 and out == "" and err.count("\n") == 1
        assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "merge pipe.safetensors adapter.safetensors out",
            "pipe.safetensors: not a readable safetensors file",
        ),
        ("merge circle adapter.safetensors out", "circle: not a readable safetensors file"),
        ("merge pipe.index.json adapter.safetensors out", "pipe.safetensors: not a readable"),
        (
            "merge base.safetensors adapter.safetensors pipe.safetensors --force",
            "a device or a pipe",
        ),
        (
            "convert adapter.safetensors pipe.safetensors --to fastlora --force",
            "a device or a pipe",
        ),
        ("inspect pipe.safetensors", "no such file or folder: pipe.safetensors"),
        ("diff adapter.safetensors circle", "no such file or folder: circle"),
        ("diff adapter.safetensors adapter.safetensors --tolerance nan", "number ≥ 0, got nan"),
        ("diff adapter.safetensors adapter.safetensors --tolerance -1", "number ≥ 0, got -1"),
    ],
)
def test_odd_paths_and_values_end_in_one_line(folder, capsys, command, message):
    os.mkfifo("pipe.safetensors")
    os.symlink("circle", "circle")
    Path("pipe.index.json").write_text('{"weight_map": {"blocks": "pipe.safetensors"}}')
    code, out, err = run(capsys, *command.split())
    assert code == (2 if command.startswith("diff") else 1) and out == "" and err.count("\n") == 1
    assert message in err
    assert Path("pipe.safetensors").is_fifo() and not Path("out").exists()


def test_a_target_that_is_a_circle_of_links_is_replaced(folder, capsys):
    os.symlink("circle", "circle")
    assert run(capsys, "merge", "base.safetensors", "adapter.safetensors", "circle")[0] == 0
    assert "blocks.0.attn.to_out.weight" in load_file("circle")


def test_pickles_are_not_read(folder, capsys):
    for name in ("evil.pt", "evil.bin"):
        Path(name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
        code, _, err = run(capsys, "inspect", name)
        assert code == 1 and "is a pickle: not supported because reading it may run code" in err
    Path("evil.safetensors").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert run(capsys, "inspect", "evil.safetensors")[0] == 1 and not Path("ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Path("peft/adapter_model.safetensors").unlink(), "only safetensors are read"),
        (lambda: Path("peft/adapter_config.json").write_text("{"), "not a readable JSON file"),
        (lambda: edit_config(r=3), "rank is 3 in the settings, 4 in the tensors"),
        (lambda: edit_config(lora_alpha=10**400), "alpha: expected a finite number"),
        (lambda: edit_config(use_dora=True), "use_dora is True in the settings, False in"),
        (
            lambda: save_file({"x": torch.ones(1)}, "peft/adapter_model.safetensors"),
            "keys that start",
        ),
    ],
)
def test_invalid_folders(folder, capsys, change, message):
    change()
    code, _, err = run(capsys, "inspect", "peft")
    assert code == 1 and message in err and err.count("\n") == 1


def edit_config(**fields):
    file, weights = Path("peft/adapter_config.json"), Path("peft/adapter_model.safetensors")
    save_file(load_file(weights), weights, {"format": "pt"})  # as PEFT writes them
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_control_characters_in_names_do_not_reach_the_terminal(folder, capsys):
    state = {"m\x1b[2J.lora_A": torch.ones(2, 4), "m\x1b[2J.lora_B": torch.ones(4, 2)}
    save_file(state | {"head\x07": torch.ones(1)}, "evil.safetensors")
    code, out, _ = run(capsys, "inspect", "evil.safetensors")
    assert code == 0 and "m?[2J" in out and "\x1b" not in out and "\x07" not in out


# the command as a program


def test_wrong_arguments_print_one_line(capsys):
    for arguments in ([], ["merge"], ["inspect", "a", "b"], ["convert", "a", "b", "--to", "x"]):
        code, out, err = run(capsys, *arguments)
        assert code == 2 and out == "" and err.count("\n") == 1 and "--help" in err


def test_help_has_an_example_of_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("inspect", "merge", "convert", "diff"):
        assert f"  fastlora {command} " in out
        code, own, _ = run(capsys, command, "--help")
        assert code == 0 and f"  fastlora {command} " in own


@pytest.mark.slow
def test_it_runs_as_a_module_and_is_an_entry_point(folder):
    root = Path(fastlora.__file__).resolve().parent.parent
    lines = (root / "pyproject.toml").read_text().splitlines()
    assert 'fastlora = "fastlora.cli.commands:main"' in lines
    command = [sys.executable, "-W", "error", "-m", "fastlora", "inspect", "adapter.safetensors"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "4 layers" in done.stdout
    done = subprocess.run([*command[:-1], "none"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr == "fastlora: error: no such file or folder: none\n"


@pytest.mark.slow
def test_a_terminal_without_unicode(folder):
    names = {"größe.lora_A": torch.ones(1, 2), "größe.lora_B": torch.ones(2, 1)}
    save_file(names, "names.safetensors")
    root = Path(fastlora.__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "fastlora", "inspect", "names.safetensors"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and rb"gr\xf6\xdfe" in done.stdout


def test_the_functions_that_it_calls(folder):
    adapter = read_adapter(Path("adapter.safetensors"))
    convert(adapter, Path("p"), "peft", force=False, alpha=None)
    assert read_adapter(Path("p")).layers.keys() == adapter.layers.keys()
    merged = merge_files(Path("base.safetensors"), adapter, Path("o.safetensors"), force=False)
    assert [layer.path for layer in merged] == list(adapter.layers)
    with pytest.raises(fastlora.CheckpointError, match="alpha: expected a finite number"):
        read_adapter(Path("loralib.safetensors"), float("nan"))


def test_a_head_is_merged_with_its_running_statistics(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    fastlora.inject_lora(model, LoRAConfig(["0"], modules_to_save=["1"]))
    fastlora.freeze_base_params(model)
    model(torch.randn(5, 4))
    fastlora.save_adapter(model, tmp_path / "a.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "out")]
    assert cli.main(["merge", *files]) == 0
    merged, want = load_file(files[2]), fastlora.merged_model(model).state_dict()
    assert merged.keys() == want.keys() and want["1.num_batches_tracked"] == 1
    assert all(torch.equal(merged[key], want[key]) for key in want)
