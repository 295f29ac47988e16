"""Model folders in the layout of SAM 3D Objects, with random weights."""

from pathlib import Path

import torch
import yaml

DECODER = {
    "resolution": 8,
    "model_channels": 256,
    "latent_channels": 8,
    "num_blocks": 2,
    "num_heads": 4,
    "mlp_ratio": 4,
    "attn_mode": "swin",
    "window_size": 8,
    "representation_config": {"use_color": True},
}
SLAT = {
    "resolution": 16,
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": 64,
    "cond_channels": 48,
    "num_blocks": 3,
    "num_heads": 4,
    "patch_size": 2,
    "num_io_res_blocks": 2,
    "io_block_channels": [32],
}


def latent(name, embedder):
    """The YAML of one latent of the stage-1 model, of 64 channels inside."""
    embedder = {"_target_": f"{name}.{embedder.pop('kind')}", "model_channels": 64, **embedder}
    return {
        "_target_": f"{name}.Latent",
        "in_channels": 8,
        "model_channels": 64,
        "pos_embedder": embedder,
    }


MODELS = "sam3d_objects.model.backbone.tdfy_dit.models"
STRUCTURE = {
    "in_channels": 8,
    "out_channels": 8,
    "model_channels": 64,
    "cond_channels": 48,
    "num_blocks": 2,
    "num_heads": 4,
    "is_shortcut_model": True,
    "qk_rms_norm": True,
    "latent_mapping": {
        "shape": latent(
            f"{MODELS}.mm_latent",
            {"kind": "ShapePositionEmbedder", "resolution": 4, "patch_size": 1},
        ),
        "pose": latent(f"{MODELS}.mm_latent", {"kind": "LearntPositionEmbedder", "token_len": 4}),
    },
}
TARGETS = {
    "decoder": f"{MODELS}.structured_latent_vae.decoder_mesh.SLatMeshDecoderTdfyWrapper",
    "slat": f"{MODELS}.structured_latent_flow.SLatFlowModelTdfyWrapper",
    "structure": f"{MODELS}.mot_sparse_structure_flow.SparseStructureFlowTdfyWrapper",
}
NAMES = {"decoder": "slat_decoder_mesh", "slat": "slat_generator", "structure": "ss_generator"}
CONFIGS = {"decoder": DECODER, "slat": SLAT, "structure": STRUCTURE}


def fill(model):
    """Fills weights that are initialised to zero: output layers, the last convolutions of the upsampling, modulations."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)


def write_folder(folder: Path, build, parts=("decoder", "slat", "structure"), **changes):
    """A model folder with the weights of `build(part, config)`: a bare state dict for the decoder, otherwise a training checkpoint."""
    folder.mkdir(exist_ok=True)
    pipeline = {"_target_": "sam3d_objects.pipeline.inference_pipeline.InferencePipeline"}
    for part in parts:
        name, config = NAMES[part], {**CONFIGS[part], **changes}
        if "latent_mapping" in config:
            channels = {"model_channels": config["model_channels"]}
            config["latent_mapping"] = {
                key: {**about, **channels, "pos_embedder": {**about["pos_embedder"], **channels}}
                for key, about in config["latent_mapping"].items()
            }
        state = build(part, config).state_dict()
        config = {"_target_": TARGETS[part], **config}
        if part == "decoder":
            torch.save(state, folder / f"{name}.pt")
            config["pretrained_ckpt_path"] = "/nowhere/decoder.safetensors"
        else:
            inside = "_base_models.generator.reverse_fn.backbone."
            state = {f"{inside}{key}": value for key, value in state.items()}
            state[f"{inside}condition_embedder.scale"] = torch.ones(1)
            state["_base_models.condition_embedder.scale"] = torch.ones(1)
            torch.save({"state_dict": state, "epoch": 3}, folder / f"{name}.pt")
            config["condition_embedder"] = {"_target_": "somewhere.EmbedderFuser", "embedders": []}
            guidance = {"_target_": "somewhere.ClassifierFreeGuidance", "backbone": config}
            generator = {"_target_": "somewhere.FlowMatching", "reverse_fn": guidance}
            config = {"module": {"generator": {"backbone": generator}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        pipeline |= {f"{name}_config_path": f"{name}.yaml", f"{name}_ckpt_path": f"{name}.pt"}
    pipeline |= {"slat_mean": [0.5] * 8, "slat_std": [2.0] * 8}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    return folder
