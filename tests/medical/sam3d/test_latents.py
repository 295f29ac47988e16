"""Cached latents: files that are refused, and latents of another region or decoder."""

import numpy as np
import pytest
import torch

from fastlora.errors import DataError
from fastlora.medical.sam3d.decoder import active_voxels
from fastlora.medical.sam3d.latents import check_slat, read_slat
from tests.medical.sam3d.test_decoder import sphere_batch

GOOD = {"coords": np.zeros((1, 3), np.int32), "feats": np.zeros((1, 8), np.float32)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"coords": GOOD["coords"]}, r"expected coords, feats, got coords"),
        ({**GOOD, "coords": np.zeros((1, 4), np.int32)}, r"coords: expected \(N, 3\) integers"),
        ({**GOOD, "coords": np.zeros((1, 3), np.float32)}, r"coords: expected \(N, 3\) integers"),
        ({**GOOD, "feats": np.zeros((2, 8), np.float32)}, r"feats: expected \(1, C\) floats"),
        ({**GOOD, "feats": np.full((1, 8), np.nan, np.float32)}, "feats: expected finite numbers"),
        ({**GOOD, "feats": np.array([[object()]], dtype=object)}, "cannot read"),
        ({**GOOD, "feats": np.array([["a"]])}, "expected numbers"),
    ],
)
def test_files_of_latents_are_checked(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message):
        read_slat(tmp_path / "a.npz")


def test_compressed_and_damaged_files_of_latents_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **GOOD)
    with pytest.raises(DataError, match="compressed"):
        read_slat(tmp_path / "a.npz")
    for name in ("b.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04nothing")
        with pytest.raises(DataError, match="cannot read"):
            read_slat(tmp_path / name)


def test_latents_of_another_region_or_decoder_are_refused():
    batch = sphere_batch()
    coords = active_voxels(batch.base_vox, 16)[:, 1:]
    feats, sdf = torch.zeros(len(coords), 8), batch.sdf_vox[0].numpy()
    check_slat({"coords": coords, "feats": feats}, sdf, 16, 8, "here")
    for slat, message in (
        ({"coords": coords, "feats": feats[:, :4]}, r"here: feats: expected \(T, 8\), got"),
        ({"coords": coords + 8, "feats": feats}, "coords: expected 0 to 15, got"),
        (
            {"coords": torch.cat([coords, coords[:1]]), "feats": torch.zeros(len(coords) + 1, 8)},
            "each voxel once",
        ),
        (
            {"coords": torch.cartesian_prod(*3 * [torch.arange(4)]), "feats": torch.zeros(64, 8)},
            "the latents of this region",
        ),
    ):
        with pytest.raises(DataError, match=message):
            check_slat(slat, sdf, 16, 8, "here")
