"""Files of diffusers and kohya against diffusers itself: what it saves computes the same in fastlora, and what fastlora writes in it."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.cli.commands import main
from tests.support.tolerance import assert_close, assert_differs

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, and of PEFT under it
SAVED = "saved/pytorch_lora_weights.safetensors"


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
    ).eval()


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def config(**changes):
    targets = ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut", "proj_in"]
    settings = {"r": 2, "lora_alpha": 6, "target_modules": targets}
    return peft.LoraConfig(**(settings | changes))


PATTERNS = {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 3}}
CONFIGS = {
    "plain": {},
    "patterns": PATTERNS,
    "rslora": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True, "target_modules": ["to_q", "to_out.0"]},
}


def adapted(make, **changes):
    """A model with PEFT's adapters under diffusers."""
    model = make()
    model.add_adapter(config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "lora_magnitude" in name:
                parameter.mul_(1.1)
    return model.eval()


def run(model):
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)

    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(random(1, 4, 4, 4), 3, random(1, 5, 6)).sample
    return model(
        hidden_states=random(1, 4, 4),
        encoder_hidden_states=random(1, 3, 6),
        pooled_projections=random(1, 6),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def outputs(model):
    with torch.no_grad():
        return run(model), run(copy.deepcopy(model).double())


def command(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loaded_from_folder(make, source, *options):
    """A plain model with the adapter of `source`, converted to a folder and loaded by fastlora."""
    assert command("convert", source, "converted", "--to", "peft", "--force", *options) == 0
    model = make()
    fastlora.from_pretrained(model, "converted")
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [unet, flux])
def test_what_diffusers_saves_computes_the_same(make, name, capsys):
    theirs = adapted(make, **CONFIGS[name])
    theirs.save_lora_adapter("saved")
    want, exact = outputs(theirs)
    assert_differs(want, outputs(make())[0])
    ours = loaded_from_folder(make, SAVED)
    assert_close(outputs(ours)[0], want, exact)
    assert command("inspect", SAVED) == 0
    assert f"{SAVED}: diffusers, " in capsys.readouterr().out
    # back: the same tensors, and the same output in diffusers
    assert command("convert", "converted", "back.safetensors", "--to", "diffusers") == 0
    before, after = load_file(SAVED), load_file("back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = make()
    again.load_lora_adapter("back.safetensors", prefix=None, use_safetensors=True)
    assert_close(outputs(again)[0], want, exact)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_pipelines_file_is_split_by_component(component, capsys):
    """As `save_lora_weights` writes it, with the metadata of each model."""
    theirs = adapted(unet, **PATTERNS)
    layers = peft.get_peft_model_state_dict(theirs)
    other = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(3, 8)}
    other["text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.randn(8, 3)
    settings = theirs.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        "saved",
        unet_lora_layers=layers,
        text_encoder_lora_layers=other,
        unet_lora_adapter_metadata=settings,
        text_encoder_lora_adapter_metadata=config(r=3, target_modules=["q_proj"]).to_dict(),
    )
    assert command("convert", SAVED, "x.safetensors", "--to", "fastlora") == 1
    assert "holds adapters of text_encoder, unet; name one" in capsys.readouterr().err
    assert not os.path.exists("x.safetensors")
    chosen = ("--component", component)
    assert command("convert", SAVED, "x.safetensors", "--to", "fastlora", *chosen) == 0
    tensors = load_file("x.safetensors")
    if component == "text_encoder":
        path = "text_model.encoder.layers.0.self_attn.q_proj"
        assert torch.equal(tensors[f"{path}.lora_A"], other[f"{path}.lora_A.weight"])
        assert len(tensors) == 2
        return
    ours = loaded_from_folder(unet, SAVED, *chosen)
    want, exact = outputs(theirs)
    assert_close(outputs(ours)[0], want, exact)
    unet().save_pretrained("base")
    assert command("merge", "base", SAVED, "merged", *chosen) == 0
    merged = diffusers.UNet2DConditionModel.from_pretrained("merged")
    assert_close(outputs(merged)[0], want, exact)


def kohya_file(path):
    """As sd-scripts writes a U-Net's adapter. diffusers loses the alpha of an attention's layer if it is not the most frequent one."""
    state = {}
    for layer, module in unet().named_modules():
        if layer.endswith(("to_q", "to_k", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in")):
            n, k = module.weight.shape[:2]
            tail = module.weight.shape[2:]
            name = "lora_unet_" + layer.replace(".", "_")
            state[f"{name}.lora_down.weight"] = torch.randn(2, k, *tail)
            state[f"{name}.lora_up.weight"] = torch.randn(n, 2, *(1 for _ in tail))
            state[f"{name}.alpha"] = torch.tensor(1.0 if layer.endswith("net.2") else 4.0)
    save_file(state, path)


def loaded_by_diffusers(path):
    """A U-Net with the adapter of a pipeline's or kohya's file, as a pipeline of diffusers loads it."""
    mixin = diffusers.StableDiffusionPipeline
    loaded = mixin.lora_state_dict(path, unet_config=unet().config, return_lora_metadata=True)
    model = unet()
    mixin.load_lora_into_unet(loaded[0], loaded[1], model, metadata=loaded[2])
    return model.eval()


@pytest.mark.parametrize("with_base", [False, True])
def test_kohyas_file_computes_what_it_does_in_diffusers(with_base):
    torch.manual_seed(4)
    kohya_file("kohya.safetensors")
    unet().save_pretrained("base")
    want, exact = outputs(loaded_by_diffusers("kohya.safetensors"))
    assert_differs(want, outputs(unet())[0])
    base = ("--base", "base") if with_base else ()
    assert_close(outputs(loaded_from_folder(unet, "kohya.safetensors", *base))[0], want, exact)
    assert command("merge", "base", "kohya.safetensors", "merged") == 0
    merged = diffusers.UNet2DConditionModel.from_pretrained("merged")
    assert_close(outputs(merged)[0], want, exact)


def test_the_files_written_for_kohya_and_pipelines_load_in_diffusers():
    targets = ["to_q", "to_out.0", "ff.net.2", "proj_in"]
    patterns = {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"ff.net.2": 3}}
    theirs = adapted(unet, target_modules=targets, **patterns)
    theirs.save_lora_adapter("saved")
    want, exact = outputs(theirs)
    for format in ("kohya", "diffusers"):
        out = f"{format}.safetensors"
        assert command("convert", SAVED, out, "--to", format, "--component", "unet") == 0
        assert all(key.startswith(("lora_unet_", "unet.")) for key in load_file(out))
        assert_close(outputs(loaded_by_diffusers(out))[0], want, exact, format)
    assert command("convert", "kohya.safetensors", "again.safetensors", "--to", "diffusers") == 0
    assert command("diff", "again.safetensors", SAVED) == 0
    assert command("convert", "again.safetensors", "twice.safetensors", "--to", "kohya") == 0
    first, second = load_file("kohya.safetensors"), load_file("twice.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("old", ["lora", "processor", "down"])
def test_the_keys_of_older_versions(old):
    theirs = adapted(unet, target_modules=["to_q", "to_out.0"], lora_alpha=2)
    theirs.save_lora_adapter("saved")
    state = {}
    for key, value in load_file(SAVED).items():
        path, side = key.rsplit(".lora_", 1)
        side = {"A.weight": "down", "B.weight": "up"}[side]
        block, _, name = path.removesuffix(".0").rpartition(".")
        named = {
            "lora": f"unet.{path}.lora.{side}.weight",
            "processor": f"unet.{block}.processor.{name}_lora.{side}.weight",
            "down": f"{path}.lora_{side}.weight",
        }
        state[named[old]] = value
    save_file(state, "old.safetensors")
    want, exact = outputs(theirs)
    assert_close(outputs(loaded_from_folder(unet, "old.safetensors"))[0], want, exact)
