"""Files of kohya and torchtune, names with underscores, and files of known formats that are refused, without the packages that write them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import CheckpointError
from fastlora.cli.commands import main
from fastlora.cli.convert import read_adapter
from fastlora.io.kohya_names import kohya_names, resolve


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def listing():
    return sorted(str(path) for path in Path(".").rglob("*"))


def pair(name, a="lora_down.weight", b="lora_up.weight", n=4, k=3, r=2):
    return {f"{name}.{a}": torch.randn(r, k), f"{name}.{b}": torch.randn(n, r)}


# names

NAMES = {
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0": "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "lora_unet_up_blocks_3_resnets_2_time_emb_proj": "unet.up_blocks.3.resnets.2.time_emb_proj",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "lora_unet_conv_in": "unet.conv_in",
    "lora_te_text_model_encoder_layers_11_self_attn_out_proj": "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_0_mlp_fc2": "text_encoder_2.text_model.encoder.layers.0.mlp.fc2",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0": "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0",
    # of sd-scripts' U-Net for SDXL, whose blocks have two layers
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_unet_input_blocks_8_0_in_layers_2": "unet.down_blocks.2.resnets.1.conv1",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_middle_block_2_out_layers_3": "unet.mid_block.resnets.1.conv2",
    "lora_unet_output_blocks_5_1_proj_out": "unet.up_blocks.1.attentions.2.proj_out",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
    "lora_unet_out_2": "unet.conv_out",
    # of transformers
    "lora_unet_double_blocks_0_img_attn_qkv": "transformer.double_blocks.0.img_attn.qkv",
    "lora_transformer_single_transformer_blocks_3_proj_mlp": "transformer.single_transformer_blocks.3.proj_mlp",
}


def test_names_of_known_models():
    assert resolve(NAMES, {}) == (NAMES, [])


def test_names_go_back_and_two_paths_of_one_name_are_refused():
    both = {
        name: path
        for name, path in NAMES.items()
        if "_blocks_0_attentions" in name or name.startswith(("lora_te1", "lora_te2"))
    }
    assert len(both) == 3 and kohya_names(both.values()) == {path: n for n, path in both.items()}
    with pytest.raises(CheckpointError, match="unet.a.b_c and unet.a_b.c have one name in kohya's"):
        kohya_names(["unet.a.b_c", "unet.a_b.c"])
    with pytest.raises(
        CheckpointError, match="transformer.x: kohya's files hold layers of unet, te"
    ):
        kohya_names(["transformer.x"])


def test_a_base_resolves_names_and_what_it_does_not_have_is_named():
    name = "lora_unet_odd_name_to_q"
    assert resolve([name], {}) == ({name: "unet.odd_name_to_q"}, [name])
    for component in ("unet", ""):
        assert resolve([name], {component: {"odd_name.to_q"}})[0] == {name: "unet.odd_name.to_q"}
    with pytest.raises(CheckpointError, match=r"odd_name_to_q may be odd\.name\.to_q or odd_name"):
        resolve([name], {"unet": {"odd.name.to_q", "odd_name.to_q"}})
    with pytest.raises(
        CheckpointError, match=r"name_to_k: is not a layer .*\(nearest: odd_name_to_q"
    ):
        resolve([name, "lora_unet_odd_name_to_k"], {"unet": {"odd_name.to_q"}})
    with pytest.raises(
        CheckpointError, match="lora_te_fc1 and lora_te1_fc1 are both text_encoder.fc"
    ):
        resolve(["lora_te_fc1", "lora_te1_fc1"], {})
    te = "lora_te_text_model_encoder_layers_0_mlp_fc1"  # of another model than the base
    assert resolve([te], {"": {"odd_name.to_q"}})[0] == {te: NAMES[te.replace("te_", "te1_", 1)]}


# kohya


def test_kohyas_file_is_read_by_value_and_its_component_chosen(capsys):
    state = pair("lora_unet_mid_block_attentions_0_proj_in") | pair(
        "lora_te_text_model_encoder_layers_0_mlp_fc1", r=1
    )
    state["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(3.0).half()
    save_file(state, "k.safetensors")
    code, out, err = run(capsys, "inspect", "k.safetensors")
    assert code == 0 and out.startswith("k.safetensors: kohya, 2 layers")
    assert err.count("\n") == 1 and "stores no alpha for text_encoder.text_model" in err
    before = listing()
    code, _, err = run(capsys, "convert", "k.safetensors", "a.safetensors", "--to", "fastlora")
    assert (code, err.count("\n"), listing()) == (1, 2, before)
    assert "--component: the file holds adapters of text_encoder, unet; name one" in err
    arguments = ("convert", "k.safetensors", "a.safetensors", "--to", "fastlora", "--component")
    code, _, err = run(capsys, *arguments, "vae")
    assert code == 1 and "expected one of text_encoder, unet, got vae" in err
    assert run(capsys, *arguments, "unet")[0] == 0
    (path, layer), *more = read_adapter(Path("a.safetensors")).layers.items()
    assert (path, layer.scaling, more) == ("mid_block.attentions.0.proj_in", 1.5, [])
    assert torch.equal(
        layer.lora_a, state["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]
    )
    assert run(capsys, *arguments, "text_encoder", "--force")[0] == 0
    (layer,) = read_adapter(Path("a.safetensors")).layers.values()
    assert layer.scaling == 1.0
    assert run(capsys, *arguments, "text_encoder", "--force", "--alpha", 5)[0] == 0
    (layer,) = read_adapter(Path("a.safetensors")).layers.values()
    assert layer.scaling == 5.0


def test_a_name_that_no_table_knows_stays_and_a_base_resolves_it(capsys):
    save_file(
        pair("lora_unet_odd_name_to_q") | {"lora_unet_odd_name_to_q.alpha": torch.tensor(2.0)},
        "k.safetensors",
    )
    model = nn.ModuleDict({"odd_name": nn.ModuleDict({"to_q": nn.Linear(3, 4)})})
    save_file(model.state_dict(), "base.safetensors")
    arguments = ("convert", "k.safetensors", "a.safetensors", "--to", "fastlora", "--force")
    code, _, err = run(capsys, *arguments)
    assert (
        code == 0 and "lora_unet_odd_name_to_q: which underscores stand for dots is unknown" in err
    )
    assert "odd_name_to_q.lora_A" in load_file("a.safetensors")
    assert run(capsys, *arguments, "--base", "base.safetensors")[::2] == (0, "")
    assert "odd_name.to_q.lora_A" in load_file("a.safetensors")
    Path("pipe/unet").mkdir(parents=True)
    Path("base.safetensors").rename("pipe/unet/diffusion_pytorch_model.safetensors")
    Path("a.safetensors").unlink()
    assert run(capsys, *arguments, "--base", "pipe")[::2] == (0, "")
    assert "odd_name.to_q.lora_A" in load_file("a.safetensors")
    code, _, err = run(capsys, *arguments, "--base", "none")
    assert code == 1 and "--base: no safetensors file: none" in err


LAYER = "lora_unet_conv_in"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {f"{LAYER}.alpha": torch.ones(2)},
            "conv_in.alpha: expected one number, got torch.float32 (2,)",
        ),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "alpha: expected a finite number"),
        ({f"{LAYER}.extra": torch.ones(1)}, "conv_in.extra: expected names as lora_unet_"),
        ({"lora_unet_conv_out.alpha": torch.tensor(1.0)}, "conv_out has alpha without lora_down"),
        ({f"{LAYER}.lora_up.weight": torch.ones(4, 3)}, "expected lora_A and lora_B as (R, K)"),
        ({f"{LAYER}.lora_down.weight": torch.ones(0, 3)}, "expected lora_A and lora_B as (R, K)"),
    ],
)
def test_damaged_files_of_kohya_are_refused_in_one_line(capsys, state, message):
    alpha = {f"{LAYER}.alpha": torch.tensor(2.0)}
    save_file(pair(LAYER) | alpha | state, "k.safetensors")
    before = listing()
    code, out, err = run(capsys, "convert", "k.safetensors", "p", "--to", "peft")
    assert (code, out, err.count("\n"), listing()) == (1, "", 1, before) and message in err


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("what", ["dora", "embedding", "groups", "dilation", "head"])
def test_what_files_of_pipelines_cannot_store_is_refused(capsys, format, what):
    layers = {
        "embedding": nn.Embedding(4, 3),
        "groups": nn.Conv2d(4, 4, 3, groups=2),
        "dilation": nn.Conv2d(4, 4, 3, dilation=2),
    }
    model = nn.ModuleDict({"x": layers.get(what, nn.Linear(4, 3)), "head": nn.Linear(2, 2)})
    kinds = ("linear", "conv", "embedding")
    fastlora.inject_lora(model, fastlora.LoRAConfig(["x"], kinds=kinds, use_dora=what == "dora"))
    fastlora.freeze_base_params(model)
    model.head.requires_grad_(what == "head")
    fastlora.save_adapter(model, "a.safetensors")
    arguments = ("convert", "a.safetensors", "out", "--to", format, "--component", "unet")
    before = listing()
    code, _, err = run(capsys, *arguments)
    if (what, format) == ("dora", "diffusers"):
        assert code == 0 and "unet.x.lora_magnitude_vector" in load_file("out")
        return
    assert (code, err.count("\n"), listing()) == (1, 1, before)
    name = "unet.head.bias" if what == "head" else "unet.x"
    assert f"{name}: {format}" in err


# torchtune


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_torchtunes_file_with_the_alpha_of_its_config(capsys, suffix):
    state = pair("layers.0.attn.q_proj", "lora_a.weight", "lora_b.weight")
    state["layers.0.attn.q_proj.magnitude"] = torch.rand(4)
    file = Path(f"adapter_0{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    code, out, _ = run(capsys, "inspect", file)
    assert code == 0 and out.startswith(f"{file}: torchtune, 1 layers") and "  ?  " in out
    code, _, err = run(capsys, "convert", file, "a.safetensors", "--to", "fastlora")
    assert code == 1 and "alpha: the file does not store it; pass it with --alpha" in err
    assert run(capsys, "convert", file, "a.safetensors", "--to", "fastlora", "--alpha", 8)[0] == 0
    config = {"r": 2, "lora_alpha": 16, "peft_type": "LORA", "target_modules": ["q_proj"]}
    Path("adapter_config.json").write_text(json.dumps(config))
    for options, scaling in (((), 8.0), (("--from", "torchtune"), 8.0)):
        arguments = ("convert", file, "b.safetensors", "--to", "fastlora", "--force", *options)
        assert run(capsys, *arguments)[0] == 0
        (path, layer), *_ = read_adapter(Path("b.safetensors")).layers.items()
        assert (path, layer.scaling, layer.use_dora) == ("layers.0.attn.q_proj", scaling, True)
        assert torch.equal(layer.lora_b, state["layers.0.attn.q_proj.lora_b.weight"])
    code, _, err = run(capsys, *arguments, "--alpha", 8)
    assert code == 1 and "adapter_config.json already stores alpha" in err
    Path("adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "r is 3, but layers.0.attn.q_proj has rank 2" in err


# what is not supported


ONE = torch.ones(1)
KNOWN = {
    "LoHa": "lora_unet_x.hada_w1_a",
    "LoKr": "lora_unet_x.lokr_w1",
    "LoCon with a core tensor": "lora_unet_x.lora_mid.weight",
    "DoRA file of LyCORIS": "lora_unet_x.dora_scale",
    "IA3": "base_model.model.x.ia3_l",
    "AdaLoRA": "base_model.model.x.lora_E",
    "VeRA": "base_model.model.x.vera_lambda_b",
    "BOFT": "base_model.model.x.boft_R",
    "prompt or prefix tuning": "prompt_embeddings",
    "textual inversion": "emb_params",
    "LoRA with biases": "unet.x.lora_B.bias",
    "Control-LoRA": "lora_controlnet",
}


def assert_refused(capsys, source, *parts):
    before = listing()
    for arguments in (("inspect", source), ("convert", source, "out", "--to", "peft")):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n"), listing()) == (1, "", 1, before)
        assert all(part in err for part in (str(source), "not supported because ", *parts)), err


@pytest.mark.parametrize("what", KNOWN)
def test_known_formats_that_are_not_supported_are_named(capsys, what):
    pair_too = pair("lora_unet_x") if KNOWN[what].startswith("lora_unet") else {}
    save_file(pair_too | {KNOWN[what]: ONE}, "x.safetensors")
    assert_refused(capsys, "x.safetensors", f"is a {what} file:", f"; keys: {KNOWN[what]}")


def test_a_model_and_files_that_hold_no_tensors_are_named(capsys):
    save_file(nn.Linear(2, 2).state_dict(), "model.safetensors")
    assert_refused(
        capsys, "model.safetensors", "2 plain tensors, as a full model's", "bias, weight"
    )
    for start, what in (
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"\x80\4\x95", "a pickle"),
        (b"<html>", "HTML"),
    ):
        for name in ("x.safetensors", "x.gguf", "x.bin"):
            Path(name).write_bytes(start + bytes(40))
            assert_refused(capsys, name, what)
    torch.save({"epoch": 3, "model": {"w": ONE}}, "x.pt")
    assert_refused(capsys, "x.pt", "is a checkpoint", "'epoch' is no tensor; keys: epoch, model")


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "VERA", "NEW"])
def test_folders_of_other_types_are_named(capsys, kind):
    Path("p").mkdir()
    Path("p/adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    assert_refused(capsys, "p", f"is a PEFT adapter of type {kind}", "keys: none")
    save_file({"k1": ONE, "k2": ONE + 1}, "p/adapter_model.safetensors")
    assert_refused(capsys, "p", f"is a PEFT adapter of type {kind}", "keys: k1, k2")


def test_another_format_than_the_named_one_is_refused(capsys):
    save_file(pair(LAYER) | {f"{LAYER}.alpha": torch.tensor(2.0)}, "k.safetensors")
    arguments = ("convert", "k.safetensors", "o.safetensors", "--to", "fastlora", "--from")
    for format in ("fastlora", "diffusers", "torchtune"):
        code, _, err = run(capsys, *arguments, format)
        assert code == 1 and err.count("\n") == 1 and not Path("o.safetensors").exists()
    assert run(capsys, *arguments, "kohya")[0] == 0
    assert run(capsys, *arguments, "nonsense")[0] == 2
    code, _, err = run(capsys, "convert", "o.safetensors", "q", "--to", "peft", "--from", "kohya")
    assert code == 1 and "conv_in.lora_A: expected names as lora_unet_" in err
