"""Cached latents: files that are refused, and latents of another region or grid."""

import numpy as np
import pytest
import torch

from fastlora.errors import DataError
from fastlora.medical.sam3d.decoder import active_voxels
from fastlora.medical.sam3d.latents import check_voxels, read_latents
from fastlora.medical.sam3d.loading import PartSettings
from tests.medical.sam3d.test_decoder import sphere_batch

DECODER = PartSettings(16, {"feats": (None, 8)})
GOOD = {"coords": np.zeros((1, 3), np.int32), "feats": np.zeros((1, 8), np.float32)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"coords": GOOD["coords"]}, r"expected coords, feats, got coords"),
        ({**GOOD, "coords": np.zeros((1, 4), np.int32)}, r"coords: expected \(N, 3\) integers"),
        ({**GOOD, "coords": np.zeros((1, 3), np.float32)}, r"coords: expected \(N, 3\) integers"),
        ({**GOOD, "feats": np.zeros((2, 8), np.float32)}, r"feats: expected \(1, C\) floats"),
        ({**GOOD, "feats": np.zeros((1, 4), np.float32)}, r"feats: expected \(N, 8\) floats, got"),
        ({**GOOD, "feats": np.full((1, 8), np.nan, np.float32)}, "feats: expected finite numbers"),
        ({**GOOD, "feats": np.array([[object()]], dtype=object)}, "cannot read"),
        ({**GOOD, "feats": np.array([["a"]])}, "expected numbers"),
    ],
)
def test_files_of_latents_are_checked(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message):
        read_latents(tmp_path / "a.npz", DECODER)


def test_compressed_and_damaged_files_of_latents_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **GOOD)
    with pytest.raises(DataError, match="compressed"):
        read_latents(tmp_path / "a.npz", DECODER)
    for name in ("b.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04nothing")
        with pytest.raises(DataError, match="cannot read"):
            read_latents(tmp_path / name, DECODER)


def test_latents_of_another_region_or_grid_are_refused():
    batch = sphere_batch()
    coords, sdf = active_voxels(batch.base_vox, 16)[:, 1:], batch.sdf_vox[0].numpy()
    check_voxels(coords, sdf, 16, "here")
    for others, message in (
        (coords + 8, "here: coords: expected 0 to 15, got"),
        (torch.cat([coords, coords[:1]]), "each voxel once"),
        (torch.cartesian_prod(*3 * [torch.arange(4)]), "the latents of this region"),
    ):
        with pytest.raises(DataError, match=message):
            check_voxels(others, sdf, 16, "here")
