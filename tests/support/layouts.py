"""The two bundled spines, re-oriented, written in each layout that `find_cases` supports.

Neither is aligned with the patient's axes: one is permuted, flipped and rotated, the other is also rotated
and has every second slice removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fastlora.medical.data.bundled import build_bundled
from fastlora.medical.scans.volumes import save_volume

STRUCTURES = {
    "spine_ct": ("vertebra_21_corpus", "vertebra_22_corpus"),
    "spine_mr": ("vertebra_6_corpus", "disc_106"),
}


@dataclass(frozen=True)
class Scan:
    """An image, array: (X, Y, Z) int16, and masks of the same shape, with the axes in the order of the file."""

    subject: str
    modality: str
    array: NDArray[np.int16]
    affine: NDArray[np.float64]
    masks: dict[str, NDArray[np.bool_]]

    def labels(self, names: list[str]) -> NDArray[np.uint8]:
        """A label map; the value of a structure is its position in `names`, from 1."""
        result = np.zeros(self.array.shape, np.uint8)
        for name, mask in self.masks.items():
            result[mask] = names.index(name) + 1
        return result

    def reordered(self, order: tuple[int, ...], flips: tuple[int, ...]) -> Scan:
        """The same scan with its axes permuted, then some of them reversed."""
        affine = np.eye(4)
        affine[:, :3], affine[:, 3] = self.affine[:, list(order)], self.affine[:, 3]
        array = self.array.transpose(order)
        masks = {n: m.transpose(order) for n, m in self.masks.items()}
        for axis in flips:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
        return replace(
            self,
            array=np.ascontiguousarray(np.flip(array, flips)),
            affine=affine,
            masks={n: np.ascontiguousarray(np.flip(m, flips)) for n, m in masks.items()},
        )

    def rotated(self, degrees: tuple[float, float, float]) -> Scan:
        """The same voxels with a rotated affine."""
        rotation = np.eye(4)
        rotation[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
        return replace(self, affine=rotation @ self.affine)

    def thinned(self) -> Scan:
        """The scan without every second slice of the last axis."""
        affine = self.affine @ np.diag([1, 1, 2, 1])
        masks = {n: m[..., ::2] for n, m in self.masks.items()}
        return replace(self, array=self.array[..., ::2], affine=affine, masks=masks)


@lru_cache(maxsize=1)
def scans(bundled: Path) -> tuple[Scan, Scan]:
    """The re-oriented CT and MR. bundled: folder of the bundled cases, which are built if they are missing."""
    found = {}
    for case in build_bundled(bundled):
        if case.subject in STRUCTURES:
            image = nib.load(case.image_path)
            masks = {
                name: np.asanyarray(nib.load(case.structures[name].path).dataobj) > 0
                for name in STRUCTURES[case.subject]
            }
            array = np.rint(image.get_fdata()).astype(np.int16)
            found[case.subject] = Scan(case.subject, case.modality, array, image.affine, masks)
    ct = found["spine_ct"].reordered((2, 0, 1), (0, 1)).rotated((8, -12, 20))
    return ct, found["spine_mr"].reordered((1, 2, 0), (2,)).thinned().rotated((-5, 10, 15))


def write_totalsegmentator(root: Path, found: tuple[Scan, ...]) -> None:
    for scan in found:
        name = {"ct": "ct.nii.gz", "mr": "mri.nii.gz"}[scan.modality]
        save_volume(root / scan.subject / name, scan.array, scan.affine)
        for structure, mask in scan.masks.items():
            path = root / scan.subject / "segmentations" / f"{structure}.nii.gz"
            save_volume(path, mask.astype(np.uint8), scan.affine)
    (root / "meta.csv").write_text(
        "image_id;age;split\n" + "".join(f"{s.subject};50;\n" for s in found), encoding="utf-8"
    )


def label_names(found: tuple[Scan, ...]) -> list[str]:
    return [name for scan in found for name in scan.masks]


def write_decathlon(root: Path, found: tuple[Scan, ...]) -> None:
    """4-D files with two channels, of which the second is the image."""
    names = label_names(found)
    training = []
    for scan in found:
        files = {kind: f"./{kind}sTr/{scan.subject}.nii.gz" for kind in ("image", "label")}
        both = np.stack([np.zeros_like(scan.array), scan.array], axis=3)
        save_volume(root / files["image"], both, scan.affine)
        save_volume(root / files["label"], scan.labels(names), scan.affine)
        training.append(files)
    content = {
        "name": "spines",
        "modality": {"0": "nothing", "1": "MRI"},
        "labels": {"0": "background"}
        | {str(n + 1): name.replace("_", " ").title() for n, name in enumerate(names)},
        "training": training,
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(content))


def write_nnunet(root: Path, found: tuple[Scan, ...]) -> None:
    names = label_names(found)
    for scan in found:
        save_volume(root / f"imagesTr/{scan.subject}_0000.nii.gz", scan.array, scan.affine)
        save_volume(root / f"labelsTr/{scan.subject}.nii.gz", scan.labels(names), scan.affine)
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0} | {name: n + 1 for n, name in enumerate(names)},
        "numTraining": len(found),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))


def write_pairs(root: Path, found: tuple[Scan, ...]) -> None:
    names = label_names(found)
    for scan in found:
        start = root / scan.subject / scan.subject
        save_volume(f"{start}-image.nii.gz", scan.array, scan.affine)
        save_volume(f"{start}-label.nii.gz", scan.labels(names), scan.affine)


def write_dicom(root: Path, found: tuple[Scan, ...]) -> None:
    for scan in found:
        write_dicom_scan(root / scan.subject, scan)


def write_dicom_scan(folder: Path, scan: Scan, slices: slice = slice(None)) -> None:
    """Write a series of single slices to images/, and a SEG of the given slices to segmentation.dcm."""
    import highdicom
    from highdicom.sr.coding import CodedConcept
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import (
        CTImageStorage,
        ExplicitVRLittleEndian,
        MRImageStorage,
        generate_uid,
    )

    def uid(name: str) -> str:
        return generate_uid(entropy_srcs=[scan.subject, name])

    (folder / "images").mkdir(parents=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ scan.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    offset = -2048 if scan.modality == "ct" else 0
    series = []
    for k in range(scan.array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage if scan.modality == "ct" else MRImageStorage
        meta.MediaStorageSOPInstanceUID = uid(f"slice {k}")
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        # The order of the file names is not that of the slices.
        path = folder / "images" / f"{(k * 7) % scan.array.shape[2]:03d}-{k}.dcm"
        item = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        item.SOPClassUID = meta.MediaStorageSOPClassUID
        item.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        item.Modality = scan.modality.upper()
        item.PatientName, item.PatientID = "Test^Spine", scan.subject
        item.PatientBirthDate = item.PatientSex = item.AccessionNumber = ""
        item.StudyID, item.StudyDate, item.StudyTime = "1", "20200101", "120000"
        item.ReferringPhysicianName, item.Manufacturer = "", "none"
        item.StudyInstanceUID, item.SeriesInstanceUID = uid("study"), uid("series")
        item.FrameOfReferenceUID, item.PositionReferenceIndicator = uid("frame"), ""
        item.SeriesNumber, item.InstanceNumber = 1, k + 1
        item.SeriesDescription = "spine"
        item.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        item.ImageOrientationPatient = [f"{v:.10f}" for v in (*axes[:, 0], *axes[:, 1])]
        item.ImagePositionPatient = [f"{v:.8f}" for v in (lps @ (0, 0, k, 1))[:3]]
        item.PixelSpacing = [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"]
        item.SliceThickness = f"{spacing[2]:.6f}"
        pixels = (scan.array[:, :, k].T.astype(np.int32) - offset).astype(np.uint16)
        item.Rows, item.Columns = pixels.shape
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 0
        item.RescaleIntercept, item.RescaleSlope = str(offset), "1"
        item.PixelData = pixels.tobytes()
        item.save_as(path, enforce_file_format=True)
        series.append(item)
    code = CodedConcept("123037004", "SCT", "Anatomical Structure")
    descriptions = [
        highdicom.seg.SegmentDescription(
            n + 1, name.replace("_", " ").title(), code, code, "MANUAL"
        )
        for n, name in enumerate(scan.masks)
    ]
    stacked = np.stack(list(scan.masks.values()), axis=-1)  # (X, Y, Z, segments)
    segmentation = highdicom.seg.Segmentation(
        series[slices],
        stacked.transpose(2, 1, 0, 3)[slices].astype(np.uint8),
        "BINARY",
        descriptions,
        uid("seg series"),
        2,
        uid("seg"),
        1,
        "none",
        "none",
        "1",
        "1",
    )
    segmentation.save_as(folder / "segmentation.dcm")


WRITERS: dict[str, Callable[[Path, tuple[Scan, ...]], None]] = {
    "TotalSegmentator": write_totalsegmentator,
    "Decathlon": write_decathlon,
    "nnU-Net": write_nnunet,
    "image/label pairs": write_pairs,
    "DICOM": write_dicom,
}
# Flags that the commands need for a layout, because the files do not contain the information.
FLAGS = {"Decathlon": ["--channel", "1"], "image/label pairs": ["--modality", "mr"]}
