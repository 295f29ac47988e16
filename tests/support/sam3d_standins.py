"""Replacements for imports of SAM 3D Objects that need a GPU: spconv's sub-manifold convolution, and one check of kaolin."""

import sys
import types

import torch
from torch import nn


class SparseConvTensor:
    """The attributes of spconv's class of this name that SAM 3D Objects uses."""

    def __init__(
        self, features, indices, spatial_shape, batch_size, grid=None, voxel_num=None, indice_dict=None
    ):  # fmt: skip
        self._features, self.indices = features, indices
        self.spatial_shape, self.batch_size = spatial_shape, batch_size
        self.grid, self.voxel_num, self.indice_dict = grid, voxel_num, indice_dict or {}
        self.benchmark, self.benchmark_record, self.thrust_allocator = False, {}, None
        self._timer = self.force_algo = self.int8_scale = None

    @property
    def features(self):
        return self._features


class SubMConv3d(nn.Module):
    """A convolution with outputs only at the input's voxels: y[v] = b + sum over offsets o of W[o] x[v + o]."""

    def __init__(self, in_channels, out_channels, kernel_size, dilation=1, bias=True, **_):
        super().__init__()
        assert dilation == 1
        self.out_channels, self.kernel_size = out_channels, kernel_size
        shape = (out_channels, kernel_size, kernel_size, kernel_size, in_channels)
        self.weight = nn.Parameter(torch.randn(shape) / (kernel_size**3 * in_channels) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x):
        voxels, reach = x.indices.long(), self.kernel_size // 2
        size = (voxels.amax(0) + 1 + 2 * reach).tolist()
        row = torch.full(size, len(voxels), device=voxels.device)  # the row after the last: zeros
        row[tuple((voxels + reach - torch.tensor([reach, 0, 0, 0])).T)] = torch.arange(len(voxels))
        padded = torch.cat([x.features, x.features.new_zeros(1, x.features.shape[1])])
        offsets = torch.cartesian_prod(*3 * [torch.arange(self.kernel_size)]).reshape(-1, 3)
        y = sum(
            padded[row[tuple((voxels + torch.cat([torch.tensor([0]), offset])).T)]]
            @ self.weight[:, offset[0], offset[1], offset[2]].T
            for offset in offsets
        )
        y = y if self.bias is None else y + self.bias
        return SparseConvTensor(y, x.indices, x.spatial_shape, x.batch_size)


def install():
    """Installs the two as spconv and kaolin in this process."""

    def check_tensor(tensor, shape, throw=True):
        assert not throw
        return len(shape) == tensor.ndim and all(
            a is None or a == b for a, b in zip(shape, tensor.shape, strict=True)
        )

    parts = {
        "spconv": {},
        "spconv.pytorch": {"SparseConvTensor": SparseConvTensor, "SubMConv3d": SubMConv3d},
        "kaolin": {},
        "kaolin.utils": {},
        "kaolin.utils.testing": {"check_tensor": check_tensor},
    }
    for name, content in parts.items():
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(content)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
