"""A package with SAM 3D Objects' module paths and conventions, a thousand times smaller, for tests without the real one.

Its mesh is that of marching cubes on the same field. The real modules are in tests/medical/sam3d/test_real.py.
"""

import sys
from pathlib import Path

SPARSE = """
import torch
from torch import nn


class SparseTensor:
    def __init__(self, feats, coords):
        self.feats, self.coords = feats, coords
        self.shape = torch.Size([int(coords[:, 0].max()) + 1, *feats.shape[1:]])

    def replace(self, feats):
        return SparseTensor(feats, self.coords)

    def type(self, dtype):
        return self.replace(self.feats.type(dtype))

    def __getitem__(self, sample):
        own = self.coords[:, 0] == sample
        return SparseTensor(self.feats[own], self.coords[own])


class SparseLinear(nn.Linear):
    def forward(self, x):
        return x.replace(super().forward(x.feats))


class SparseGELU(nn.GELU):
    def forward(self, x):
        return x.replace(super().forward(x.feats))
"""

DECODER = """
import torch
import torch.utils.checkpoint
from skimage import measure
from torch import nn

from ...modules.sparse import SparseGELU, SparseLinear


class Result:
    pass


class Extractor:
    def __init__(self, device, res, use_color):
        self.device, self.res, self.use_color = device, res, use_color

    def __call__(self, x, training=False):
        steps = torch.arange(5)
        corners = (x.coords[:, None, 1:] * 4 + torch.cartesian_prod(steps, steps, steps)).reshape(-1, 3)
        places, inverse = torch.unique(corners.long(), dim=0, return_inverse=True)
        given = x.feats.view(-1, 4)
        sums = given.new_zeros(len(places), 4).index_add(0, inverse, given)
        values = sums / torch.bincount(inverse)[:, None]
        result, size = Result(), self.res + 1
        distance = values[:, 0] - 1 / self.res
        position = places / self.res - 0.5 + torch.tanh(values[:, 1:]) / (2 * self.res)
        axis = torch.arange(size) / self.res - 0.5
        dense = torch.ones(size, size, size).index_put(tuple(places.T), distance)
        at = torch.cartesian_prod(axis, axis, axis).view(size, size, size, 3)
        at = at.index_put(tuple(places.T), position)
        result.vertices, result.faces = torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)
        if (dense < 0).any():
            found, faces, _, _ = measure.marching_cubes(dense.detach().numpy(), 0.0)
            found = torch.from_numpy(found.copy())
            low, high = (tuple(end.long().T) for end in (found.floor(), found.ceil()))
            share = (dense[low] / (dense[low] - dense[high]).where(dense[low] != dense[high], torch.ones(1)))[:, None]
            result.vertices = at[low] + share * (at[high] - at[low])
            result.faces = torch.from_numpy(faces.copy()).long()
        result.success = len(result.faces) > 0
        if training:
            result.tsdf_v, result.tsdf_s = position, distance
            result.reg_loss = (given - values[inverse]).square().mean()
        return result


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x):
        mixed = []
        qkv = self.to_qkv(x.feats)
        for sample in range(x.shape[0]):
            q, k, v = qkv[x.coords[:, 0] == sample].chunk(3, dim=1)
            mixed.append(torch.softmax(q @ k.T / q.shape[1] ** 0.5, dim=1) @ v)
        return x.replace(self.to_out(torch.cat(mixed)))


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(
            SparseLinear(channels, channels), SparseGELU(), SparseLinear(channels, channels)
        )

    def forward(self, x):
        return self.mlp(x)


class Block(nn.Module):
    use_checkpoint = False

    def __init__(self, channels):
        super().__init__()
        self.attn, self.mlp = Attention(channels), FeedForward(channels)

    def _forward(self, x):
        x = x.replace(x.feats + self.attn(x).feats)
        return x.replace(x.feats + self.mlp(x).feats)

    def forward(self, x):
        if self.use_checkpoint:
            return torch.utils.checkpoint.checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class SLatMeshDecoder(nn.Module):
    def __init__(self, resolution, model_channels, latent_channels, num_blocks, representation_config,
                 use_fp16=False, device="cuda", **others):
        super().__init__()
        assert others.keys() <= {"num_heads", "mlp_ratio", "attn_mode", "window_size"}, others
        self.resolution, self.in_channels = resolution, latent_channels
        self.dtype = torch.float32
        self.input_layer = SparseLinear(latent_channels, model_channels)
        self.blocks = nn.ModuleList(Block(model_channels) for _ in range(num_blocks))
        self.out_layer = SparseLinear(model_channels, 4 * 125)
        self.mesh_extractor = Extractor(device, 4 * resolution, representation_config["use_color"])
        if use_fp16:
            self.convert_to_fp16()
            self.dtype = torch.float16

    def convert_to_fp16(self):
        self.blocks.half()

    def convert_to_fp32(self):
        self.blocks.float()

    def forward(self, x):
        h = self.input_layer(x).type(self.dtype)
        for block in self.blocks:
            h = block(h)
        h = self.out_layer(h.type(x.feats.dtype))
        return [self.mesh_extractor(h[i], training=self.training) for i in range(h.shape[0])]


class SLatMeshDecoderTdfyWrapper(SLatMeshDecoder):
    pass
"""

FLOW = """
import torch
from torch import nn


class Block(nn.Module):
    use_checkpoint = False

    def __init__(self, names, channels, cond_channels):
        super().__init__()
        self.to_qkv = nn.ModuleDict({name: nn.Linear(channels, channels) for name in names})
        self.to_out = nn.ModuleDict({name: nn.Linear(channels, channels) for name in names})
        self.to_q, self.to_kv = nn.Linear(channels, channels), nn.Linear(cond_channels, channels)
        self.mlp = nn.ModuleDict({name: nn.Linear(channels, channels) for name in names})

    def forward(self, h, time, cond):
        seen = torch.tanh(self.to_kv(cond)).mean(1, keepdim=True) + time
        mixed = {n: self.to_qkv[n](x) for n, x in h.items()}
        common = sum(x.mean(1, keepdim=True) for x in mixed.values())
        mixed = {n: torch.tanh(x + common + seen + self.to_q(h[n])) for n, x in mixed.items()}
        return {n: x + self.mlp[n](torch.tanh(self.to_out[n](mixed[n]))) for n, x in h.items()}


class SparseStructureFlowTdfyWrapper(nn.Module):
    def __init__(self, latent_mapping, model_channels, cond_channels, num_blocks, condition_embedder=None,
                 is_shortcut_model=False, **others):
        super().__init__()
        assert condition_embedder is None
        assert others.keys() <= {"in_channels", "out_channels", "num_heads", "qk_rms_norm"}, others
        self.is_shortcut_model = is_shortcut_model
        self.latent_mapping = nn.ModuleDict(latent_mapping)
        self.input_latent_mappings = list(latent_mapping)
        self.blocks = nn.ModuleList(
            Block(latent_mapping, model_channels, cond_channels) for _ in range(num_blocks)
        )

    def forward(self, latents, t, cond, d):
        assert not d.any()
        h = {n: self.latent_mapping[n].input_layer(latents[n]) for n in latents}
        for block in self.blocks:
            h = block(h, t.view(-1, 1, 1) / 1000, cond)
        return {n: self.latent_mapping[n].out_layer(x) for n, x in h.items()}
"""

SLAT_FLOW = """
from torch import nn

from ..modules.sparse import SparseTensor
from .mot_sparse_structure_flow import Block


class SLatFlowModelTdfyWrapper(nn.Module):
    def __init__(self, resolution, in_channels, out_channels, model_channels, cond_channels, num_blocks,
                 condition_embedder=None, **others):
        super().__init__()
        assert condition_embedder is None
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.out_layer = nn.Linear(model_channels, out_channels)
        self.blocks = nn.ModuleList(
            Block(["x"], model_channels, cond_channels) for _ in range(num_blocks)
        )

    def forward(self, x, t, cond, coords):
        assert len(x) == 1 and coords.shape == (x.shape[1], 4) and not coords[:, 0].any()
        h = {"x": self.input_layer(x)}
        for block in self.blocks:
            h = block(h, t.view(-1, 1, 1) / 1000, cond)
        return self.out_layer(h["x"])
"""

LATENT = """
from torch import nn


class Latent(nn.Module):
    def __init__(self, in_channels, model_channels, pos_embedder):
        super().__init__()
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.out_layer = nn.Linear(model_channels, in_channels)
        assert pos_embedder() == "embedding"


def ShapePositionEmbedder(model_channels, resolution, patch_size):
    return lambda: "embedding"


def LearntPositionEmbedder(model_channels, token_len):
    return lambda: "embedding"
"""

INIT = """
import os
if not os.environ.get("LIDRA_SKIP_INIT"):
    import sam3d_objects.init
"""


def write_package(folder: Path) -> None:
    """Writes `sam3d_objects` into a folder, which must then be added to the path."""
    base = folder / "sam3d_objects"
    inner = base / "model" / "backbone" / "tdfy_dit"
    files = {
        base / "__init__.py": INIT,
        inner / "modules" / "sparse" / "__init__.py": SPARSE,
        inner / "models" / "structured_latent_vae" / "decoder_mesh.py": DECODER,
        inner / "models" / "mot_sparse_structure_flow.py": FLOW,
        inner / "models" / "structured_latent_flow.py": SLAT_FLOW,
        inner / "models" / "mm_latent.py": LATENT,
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in [path for path in base.rglob("*") if path.is_dir()]:
        (path / "__init__.py").touch()


def forget_package():
    """Removes `sam3d_objects` from sys.modules; returns the removed modules."""
    names = [name for name in sys.modules if name.split(".")[0] == "sam3d_objects"]
    return {name: sys.modules.pop(name) for name in names}
