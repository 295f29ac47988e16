"""Every kind of layer through every format and the command: what it merges equals what Python merges."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import CheckpointError, LoRAConfig
from fastlora.cli.commands import main
from fastlora.cli.convert import difference_norm, read_adapter, update_norm
from fastlora.config import KINDS
from fastlora.io.adapter_state import LayerState
from tests.support.hostile import Reader, fuzz
from tests.support.models import randomise_adapters
from tests.support.paths import ROOT
from tests.support.tolerance import assert_close, assert_differs


def conv1d_of_transformers(n, k):
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(n, k)


CASES = {
    "linear": (lambda: nn.Linear(6, 5), {}),
    "rslora": (lambda: nn.Linear(6, 5), {"use_rslora": True}),
    "dora": (lambda: nn.Linear(6, 5), {"use_dora": True}),
    "pissa": (lambda: nn.Linear(6, 5), {"init_lora_weights": "pissa"}),
    "dora and olora": (
        lambda: nn.Linear(6, 5),
        {"use_dora": True, "init_lora_weights": "olora", "use_rslora": True},
    ),
    "transposed": (lambda: conv1d_of_transformers(5, 6), {}),
    "transposed square": (lambda: conv1d_of_transformers(6, 6), {}),
    "transposed dora": (lambda: conv1d_of_transformers(6, 6), {"use_dora": True}),
    "transposed pissa": (lambda: conv1d_of_transformers(5, 6), {"init_lora_weights": "pissa"}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), {"use_rslora": True}),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), {}),
    "conv of size 1": (lambda: nn.Conv2d(6, 6, 1), {}),
    "conv with groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), {}),
    "conv with dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding_mode="circular"), {}),
    "embedding": (lambda: nn.Embedding(7, 5), {}),
    "embedding square": (lambda: nn.Embedding(6, 6), {}),
}
PEFT_COMPUTES_OTHERWISE = ("conv with groups", "conv with dilation")
LORALIB_HAS = ("linear", "rslora", "pissa", "transposed", "transposed pissa", "embedding")


class Net(nn.Module):
    """One layer to adapt, and a head whose weight and bias train."""

    def __init__(self, name):
        super().__init__()
        self.body = nn.ModuleList([CASES[name][0]()])
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.body[0](x)


def plain(name):
    torch.manual_seed(3)
    return Net(name).eval()


def adapted(name, seed=5, rank=4):
    model = plain(name)
    config = LoRAConfig(["body"], rank=rank, alpha=6.0, kinds=KINDS, **CASES[name][1])
    fastlora.inject_lora(model, config)
    fastlora.freeze_base_params(model)
    model.head.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.eval()


def save(model, format, target):
    if format == "fastlora":
        fastlora.save_adapter(model, target)
    elif format == "peft":
        fastlora.save_pretrained(model, target)
    else:
        state = fastlora.get_lora_state_dict(model, include_trainable=True)
        save_file({key: value.clone() for key, value in state.items()}, target)


def command(*arguments):
    return main([str(argument) for argument in arguments])


def contents(file):
    """Tensors as bytes, and the metadata."""
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["fastlora"])
    return {key: value.numpy().tobytes() for key, value in load_file(file).items()}, metadata


def merged_by_command(model, adapter, alpha=()):
    """The merged state dict; `adapter` is in the current folder, as is the base afterwards."""
    save_file(fastlora.base_state_dict(model), "base.safetensors")
    out = "merged.safetensors"
    assert command("merge", "base.safetensors", adapter, out, "--force", *alpha) == 0
    return load_file(out)


def assert_merged_as_in_python(got, model):
    want = fastlora.merged_model(model).state_dict()
    wide = fastlora.merged_model(copy.deepcopy(model).double()).state_dict()
    assert got.keys() == want.keys()
    for key in want:
        assert_close(got[key], want[key], wide[key], key)
    assert_differs(got["body.0.weight"], fastlora.base_state_dict(model)["body.0.weight"])


CHAINS = [
    ["fastlora"],
    ["peft"],
    ["fastlora", "fastlora"],
    ["fastlora", "peft"],
    ["peft", "fastlora"],
    ["fastlora", "peft", "fastlora", "peft"],
    ["fastlora", "loralib"],
    ["peft", "loralib", "fastlora"],
]


def holds(chain, name):
    """Whether every format of the chain can store the layer; the refusals of the others are tested below."""
    return not ("peft" in chain and name in PEFT_COMPUTES_OTHERWISE) and not (
        "loralib" in chain and name not in LORALIB_HAS
    )


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        pytest.param(name, chain, id=f"{name}: {' to '.join(chain)}")
        for name in CASES
        for chain in CHAINS
        if holds(chain, name)
    ],
)
def test_the_command_merges_what_python_merges(name, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted(name)
    save(model, chain[0], "0.safetensors" if chain[0] != "peft" else "0")
    source, alpha = ("0" if chain[0] == "peft" else "0.safetensors"), ()
    for i, format in enumerate(chain[1:], 1):
        target = str(i) if format == "peft" else f"{i}.safetensors"
        if format == "loralib":
            layer = read_adapter(Path(source)).folded().layers["body.0"]
            alpha = ("--alpha", layer.scaling * layer.rank)
        assert command("convert", source, target, "--to", format, *alpha) == 0
        alpha = alpha if format == "loralib" else ()
        source = target
    assert_merged_as_in_python(merged_by_command(model, source, alpha), model)


@pytest.mark.parametrize("name", CASES)
def test_a_converted_file_loads_and_computes_the_same(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, twin = adapted(name), adapted(name, seed=6)
    save(model, "fastlora", "a.safetensors")
    assert command("convert", "a.safetensors", "b.safetensors", "--to", "fastlora") == 0
    assert contents("a.safetensors") == contents("b.safetensors")
    x = model.body[0].sample_input(3, torch.Generator().manual_seed(1))
    assert_differs(twin(x), model(x))
    fastlora.load_adapter(twin, "b.safetensors")
    assert torch.equal(twin(x), model(x)) and torch.equal(twin.head.bias, model.head.bias)
    if name not in PEFT_COMPUTES_OTHERWISE:
        assert command("convert", "a.safetensors", "p", "--to", "peft") == 0
        other = plain(name)
        fastlora.from_pretrained(other, "p")
        wide = copy.deepcopy(model).double()
        assert_close(other(x), model(x), wide(x.double() if x.is_floating_point() else x))


@pytest.mark.filterwarnings("ignore")  # PEFT's, about fan_in_fan_out and groups
@pytest.mark.parametrize("name", [n for n in CASES if n not in PEFT_COMPUTES_OTHERWISE])
def test_peft_computes_the_same_with_a_converted_folder(name, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model = adapted(name)
    save(model, "fastlora", "a.safetensors")
    assert command("convert", "a.safetensors", "p", "--to", "peft") == 0
    theirs = peft.PeftModel.from_pretrained(plain(name), "p").eval()
    x = model.body[0].sample_input(3, torch.Generator().manual_seed(1))
    wide = copy.deepcopy(model).double()(x.double() if x.is_floating_point() else x)
    assert_close(theirs(x), model(x), wide)
    assert_differs(theirs(x), plain(name)(x))
    theirs.save_pretrained("theirs")  # a folder written by PEFT merges as ours does
    assert_merged_as_in_python(merged_by_command(model, "theirs"), model)


@pytest.mark.parametrize("name", CASES)
def test_inspect_and_diff_support_every_kind(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = adapted(name)
    save(model, "fastlora", "a.safetensors")
    assert command("inspect", "a.safetensors", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["layers"]
    layer = model.body[0]
    assert (row["kind"], row["r"]) == (layer.kind, 4)
    assert row["groups"] == getattr(layer.wrapped, "groups", 1)
    assert row["use_dora"] == (layer.lora_magnitude is not None)
    assert row["subtracts_init"] == (layer.initial_A is not None)
    if row["use_dora"]:
        assert row["|dW|"] is None
    else:
        assert row["|dW|"] == pytest.approx(layer.delta(torch.float64).norm().item())
    assert command("inspect", "a.safetensors") == 0
    line = next(t for t in capsys.readouterr().out.splitlines() if t.startswith("body.0"))
    assert ("DoRA" in line, "init subtracted" in line, "rsLoRA" in line) == (
        row["use_dora"],
        row["subtracts_init"],
        row["use_rslora"],
    )
    assert command("convert", "a.safetensors", "b.safetensors", "--to", "fastlora") == 0
    assert command("diff", "a.safetensors", "b.safetensors") == 0
    if name not in PEFT_COMPUTES_OTHERWISE:
        assert command("convert", "a.safetensors", "p", "--to", "peft") == 0
        assert command("diff", "a.safetensors", "p") == 0
    for tensor in layer.lora_parameters().values():
        save(model, "fastlora", "a.safetensors")
        with torch.no_grad():
            tensor.mul_(1.01)
        save(model, "fastlora", "b.safetensors")
        assert command("diff", "a.safetensors", "b.safetensors") == 1


def test_the_norm_of_a_difference_of_convolutions_with_groups(tmp_path):
    one, other = adapted("conv with groups"), adapted("conv with groups", seed=6, rank=2)
    states = []
    for i, model in enumerate((one, other)):
        fastlora.save_adapter(model, tmp_path / f"{i}.safetensors")
        states.append(read_adapter(tmp_path / f"{i}.safetensors").layers["body.0"])
    deltas = [model.body[0].delta(torch.float64) for model in (one, other)]
    assert difference_norm(*states) == pytest.approx((deltas[0] - deltas[1]).norm().item())
    assert states[0].scaling * update_norm(states[0]) == pytest.approx(deltas[0].norm().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["dora", "pissa", "transposed", "conv with groups", "embedding"])
def test_bases_of_other_dtypes(name, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted(name)
    model.body[0].wrapped.to(dtype)
    save(model, "fastlora", "a.safetensors")
    got = merged_by_command(model, "a.safetensors")["body.0.weight"]
    want = model.body[0].merge_weights().weight
    assert_close(got, want, copy.deepcopy(model).double().body[0].merge_weights().weight)


# What a format or a file cannot store


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("conv with groups", "peft", "body.0: PEFT's adapter of a convolution with groups=2 is no"),
        (
            "conv with dilation",
            "peft",
            "with dilation=(2,), padding_mode=circular is not an update",
        ),
        ("conv1d", "loralib", "body.0: loralib has different factors for convolutions"),
        ("dora", "loralib", "body.0: loralib has no DoRA"),
    ],
)
def test_what_a_format_cannot_store_is_refused(
    name, format, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save(adapted(name), "fastlora", "a.safetensors")
    arguments = ("convert", "a.safetensors", "out", "--to", format, "--alpha", 6.0)
    assert command(*arguments[: None if format == "loralib" else -2]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path("out").exists()


def test_dora_on_some_layers_only_is_refused_for_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    fastlora.inject_lora(model, lambda path, _: LoRAConfig(use_dora=path == "0"))
    fastlora.freeze_base_params(model)
    fastlora.save_adapter(model, "a.safetensors")
    assert command("convert", "a.safetensors", "p", "--to", "peft") == 1
    assert "some layers have DoRA and some do not" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="model: some layers have DoRA.*use save_adapter"):
        fastlora.save_pretrained(model, "p")
    assert not Path("p").exists()


def rewritten(source, target, change):
    """A fastlora file with other settings for its layer."""
    data = Path(source).read_bytes()
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fastlora"])
    change(metadata["layers"]["body.0"])
    save_file(load_file(source), target, {"format": "pt", "fastlora": json.dumps(metadata)})


def test_an_old_file_of_a_convolution_merges_but_does_not_convert(tmp_path, monkeypatch, capsys):
    """Before dilation and padding mode were in the metadata."""
    monkeypatch.chdir(tmp_path)
    model = adapted("conv with groups")
    save(model, "fastlora", "new.safetensors")

    def older(settings):
        del settings["dilation"], settings["padding_mode"]

    rewritten("new.safetensors", "old.safetensors", older)
    assert_merged_as_in_python(merged_by_command(model, "old.safetensors"), model)
    fastlora.load_adapter(adapted("conv with groups", seed=6), "old.safetensors")
    assert command("convert", "old.safetensors", "p", "--to", "peft") == 1
    assert "does not store the convolution's dilation and padding mode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("conv1d", {"dilation": [1, 1]}, "dilation, padding_mode: expected 1 integers"),
        ("conv1d", {"dilation": "1"}, "dilation, padding_mode: expected 1 integers"),
        ("conv1d", {"padding_mode": ["zeros"]}, "dilation, padding_mode: expected 1 integers"),
        ("conv1d", {"kind": "linear"}, "expected lora_A and lora_B as (R, K) and (N, R), got"),
        ("linear", {"kind": "conv"}, "expected lora_A and lora_B as (R, C/groups, *kernel)"),
        ("linear", {"kind": ["linear"]}, "kind: expected one of linear, transposed, experts,"),
        ("linear", {"use_dora": True}, "use_dora is True in the settings, False in the tensors"),
        ("dora", {"use_dora": False}, "use_dora is False in the settings, True in the tensors"),
        ("dora", {"kind": "embedding"}, "lora_magnitude: not supported for kind 'embedding'"),
        ("pissa", {"kind": "embedding"}, "initial_A, initial_B: not supported for kind"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(name, change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(adapted(name), "fastlora", "good.safetensors")
    rewritten("good.safetensors", "invalid.safetensors", lambda settings: settings.update(change))
    assert command("inspect", "invalid.safetensors") == 1
    err = capsys.readouterr().err
    assert "invalid.safetensors: body.0: " in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dora", {"body.0.lora_magnitude": torch.ones(4)}, "lora_magnitude: expected shape (5,)"),
        ("dora", {"body.0.lora_magnitude": torch.ones(5).int()}, "expected a float tensor, got"),
        ("pissa", {"body.0.initial_A": torch.ones(4, 5)}, "initial_A: expected shape (4, 6)"),
        ("pissa", {"body.0.initial_A": None}, "expected both of initial_A and initial_B"),
        ("conv1d", {"body.0.lora_B": torch.ones(6, 3, 1)}, "expected lora_A and lora_B as"),
        ("conv1d", {"body.0.lora_B": torch.ones(6, 4, 2)}, "expected lora_A and lora_B as"),
        ("conv1d", {"body.0.lora_B": torch.ones(7, 2, 1)}, "expected lora_A and lora_B as"),
        ("linear", {"body.0.lora_A": None}, "body.0 has lora_B without lora_A"),
    ],
)
def test_tensors_that_do_not_fit_together(name, change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(adapted(name), "loralib", "good.safetensors")
    tensors = {k: v for k, v in (load_file("good.safetensors") | change).items() if v is not None}
    save_file(tensors, "invalid.safetensors")
    assert command("inspect", "invalid.safetensors") == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_scaling_that_float32_cannot_hold(tmp_path, monkeypatch, capsys):
    """Found by fuzzing."""
    monkeypatch.chdir(tmp_path)
    model = adapted("linear")
    save(model, "fastlora", "good.safetensors")
    save_file(fastlora.base_state_dict(model), "base.safetensors")
    rewritten(
        "good.safetensors", "invalid.safetensors", lambda settings: settings.update(alpha=-1e300)
    )
    assert command("merge", "base.safetensors", "invalid.safetensors", "out") == 1
    assert "body.0: the scaling -2.5e+299 is too large for float32" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("source", ["adapter_v1/adapter.safetensors", "peft"])
def test_damaged_adapters_of_every_kind_are_refused(source, tmp_path, monkeypatch):
    """All errors are fastlora's."""
    monkeypatch.chdir(tmp_path)
    model = adapted("embedding")
    save(model, "peft", "peft")
    weights = Path("peft/adapter_model.safetensors")
    golden = ROOT / "tests" / "golden" / source
    good = (golden if source != "peft" else weights).read_bytes()
    name = "x.safetensors" if source != "peft" else str(weights)

    def use(path):
        state = read_adapter(path.parent if source == "peft" else path)
        for layer in state.layers.values():
            update_norm(layer)
            layer.folded().merge(torch.zeros(layer.weight_shape))

    assert fuzz(Reader(good, use, name, header=1100), tmp_path, 200) > 50


class Mixed(nn.Module):
    """A matrix whose shape shows that it is stored transposed, and a square one."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([conv1d_of_transformers(5, 6), nn.Linear(6, 6)])


def test_a_square_weight_of_unknown_orientation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = Mixed()
    fastlora.inject_lora(model, LoRAConfig(["body"], rank=2))
    fastlora.freeze_base_params(model)
    base = fastlora.base_state_dict(model)
    save_file(base, "base.safetensors")
    state = {key: value.clone() for key, value in fastlora.get_lora_state_dict(model).items()}
    save_file(state, "loralib.safetensors")
    arguments = ("merge", "base.safetensors", "loralib.safetensors", "out", "--alpha", 2)
    assert command(*arguments) == 1
    err = capsys.readouterr().err
    assert "body.1: whether this square weight is stored transposed is unknown" in err
    assert "since body.0 is not stored as" in err and not Path("out").exists()
    fastlora.save_adapter(model, "a.safetensors")  # which stores the orientation
    assert command("merge", "base.safetensors", "a.safetensors", "out") == 0
    save_file({k: v for k, v in state.items() if "body.1" in k}, "square.safetensors")
    assert command("merge", "base.safetensors", "square.safetensors", "two", "--alpha", 2) == 0
    assert (
        "note: square.safetensors: body.1: the file does not store whether"
        in capsys.readouterr().err
    )
    convert = ("convert", "square.safetensors", "b.safetensors", "--to", "fastlora", "--alpha", 2)
    assert command(*convert) == 0
    assert "body.1: the file does not store whether" in capsys.readouterr().err


def test_a_convolution_of_a_peft_folder_prints_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = adapted("conv2d")
    save(model, "peft", "p")
    merged_by_command(model, "p")
    assert "note: p: body.0: a PEFT folder does not store the dilation" in capsys.readouterr().err
    model = adapted("conv of size 1")
    save(model, "peft", "q")
    merged_by_command(model, "q")
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore")  # PEFT's, about groups
def test_a_peft_folder_with_groups_is_refused(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    model = peft.get_peft_model(
        plain("conv with groups"), peft.LoraConfig(r=4, target_modules=["body.0"])
    )
    model.save_pretrained("p")
    with pytest.raises(
        CheckpointError, match=r"p: body.0: .*convolution with groups=2 is not an update"
    ):
        read_adapter(Path("p"))


class Shared(nn.Module):
    """Two layers that are one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again = self.one

    def forward(self, x):
        return self.two(self.again(torch.relu(self.one(x))))


def test_a_layer_under_two_names_is_merged_under_both_and_refused_for_peft(tmp_path, capsys):
    model = Shared()
    fastlora.inject_lora(model, ["one", "two"], rank=2)
    fastlora.freeze_base_params(model)
    randomise_adapters(model)
    adapter, x = tmp_path / "adapter.safetensors", torch.randn(5, 6)
    fastlora.save_adapter(nn.DataParallel(model), adapter)
    plain = Shared().state_dict()
    one_name = {key: value for key, value in plain.items() if not key.startswith("one.")}
    prefixed = {f"model.{key}": value for key, value in plain.items()}
    for name, held in (("both", plain), ("one", one_name), ("prefixed", prefixed)):
        base, out = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-out.safetensors"
        save_file({key: value.clone() for key, value in held.items()}, base)
        assert main(["merge", str(base), str(adapter), str(out)]) == 0
        state = {key.removeprefix("model."): value for key, value in load_file(out).items()}
        assert state.keys() == {key.removeprefix("model.") for key in held}
        merged = Shared()
        merged.load_state_dict(state, strict=name != "one")
        assert torch.equal(merged(x), fastlora.merged_model(model)(x))
    capsys.readouterr()
    assert main(["convert", str(adapter), str(tmp_path / "folder"), "--to", "peft"]) == 1
    assert "again and one are one module, which PEFT would adapt" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    copy_of = tmp_path / "copy.safetensors"
    assert main(["convert", str(adapter), str(copy_of), "--to", "fastlora"]) == 0
    assert copy_of.read_bytes() == adapter.read_bytes()


def test_names_of_a_shared_layer_are_checked():
    tensors = {"lora_A": torch.ones(2, 6), "lora_B": torch.ones(6, 2)}
    settings = {"rank": 2, "alpha": 4.0, "kind": "linear"}
    for value in ("again", [1], 3):
        with pytest.raises(CheckpointError, match="shared_with: expected a list of names, got"):
            LayerState.from_file(tensors, settings | {"shared_with": value})


class Twice(nn.Module):
    """Heads that share tensors of several kinds, and one that only starts with the values of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 6)
        self.conv, self.same_conv = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 1)
        self.norm, self.same_norm = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
        self.same_head = self.head
        self.equal = copy.deepcopy(self.head)
        self.same_conv.weight = self.conv.weight
        self.same_norm.weight, self.same_norm.bias = self.norm.weight, self.norm.bias

    def forward(self, x):
        y = self.same_conv(self.conv(self.body(x)[..., None]))[..., 0]
        y = self.same_norm(self.norm(y))
        return self.head(y) + self.same_head(2 * y) + self.equal(y)


HEADS = ["conv", "same_conv", "norm", "same_norm", "head", "equal"]


def trained_twice(heads=HEADS):
    model = Twice()
    fastlora.inject_lora(model, LoRAConfig(["body"], rank=2, modules_to_save=heads))
    fastlora.freeze_base_params(model)
    randomise_adapters(model)
    model.train()(torch.randn(5, 6))  # the running statistics change
    with torch.no_grad():
        for parameter in fastlora.get_trainable_params(model):
            if parameter.ndim > 1:
                parameter.add_(0.1)
    return model.eval()


@pytest.mark.parametrize("told", [True, False])
def test_tied_heads_of_every_shape_are_merged_into_a_base_that_has_them_once(
    tmp_path, capsys, told
):
    from safetensors.torch import load_model, save_model

    model, x = trained_twice(), torch.randn(5, 6)
    adapter, base, out = (str(tmp_path / f"{n}.safetensors") for n in ("adapter", "base", "out"))
    fastlora.save_adapter(model, adapter)
    if not told:  # as PEFT's folders
        assert main(["convert", adapter, str(tmp_path / "folder"), "--to", "peft"]) == 0
        adapter = str(tmp_path / "folder")
    save_model(Twice(), base)
    assert main(["merge", base, adapter, out]) == 0
    err = capsys.readouterr().err
    assert ("equal to other heads that are: taken for tied to them" in err) == (not told)
    merged = Twice()
    load_model(merged, out)
    assert torch.equal(merged.eval()(x), fastlora.merged_model(model)(x))


def test_a_head_that_is_only_equal_to_another_is_not_dropped(tmp_path, capsys):
    model = trained_twice()
    adapter, base, out = (str(tmp_path / f"{n}.safetensors") for n in ("adapter", "base", "out"))
    fastlora.save_adapter(model, adapter)
    state = Twice().state_dict()
    save_file({k: v.clone() for k, v in state.items() if not k.startswith("equal")}, base)
    assert main(["merge", base, adapter, out]) == 1
    assert "the base does not fit the adapter: no equal." in capsys.readouterr().err


def test_a_module_that_trains_in_part_is_not_converted(tmp_path, capsys):
    # Whose weight is that of same_conv, too.
    model = trained_twice(["conv", "norm", "same_norm"])
    adapter, folder = tmp_path / "adapter.safetensors", tmp_path / "folder"
    fastlora.save_adapter(model, adapter)
    assert main(["convert", str(adapter), str(folder), "--to", "peft"]) == 1
    assert (
        "same_conv.bias is not in the file, but belongs to a module of" in capsys.readouterr().err
    )
    assert not folder.exists()
    fastlora.save_pretrained(model, folder)
    fresh = Twice()
    fastlora.from_pretrained(fresh, folder)
    assert torch.equal(fresh.conv.weight, model.conv.weight)
    assert fresh.same_conv.weight is fresh.conv.weight
