"""The default data set: three real cases, built from installed PyPI packages.

| case | image | structures |
| --- | --- | --- |
| spine_ct | CT crop of a spine, 1.5 mm (TPTBox) | vertebra_21 … 23 |
| spine_mr | T2w MR crop of another spine, 1.5 mm (TPTBox) | vertebra_5 … 7, disc_105, disc_106 |
| brain_mni | T1w MNI ICBM152 brain, 1 mm (nilearn) | grey_matter, white_matter |

Disc 100 + v lies below vertebra v. Each vertebra also comes in two parts, `<vertebra>_corpus` and
`<vertebra>_posterior_elements` (arch and processes). The layout is TotalSegmentator's; a README in
the folder states provenance and licences. The packages are located without importing them, the
SHA-256 of each source file is checked, and nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from fastlora.errors import DataError
from fastlora.medical.data.generated import generate_folder, sha256
from fastlora.medical.scans.geometry import FloatArray, Mask
from fastlora.medical.scans.layouts import find_cases
from fastlora.medical.scans.volumes import Case, save_volume

LAYOUT_VERSION = 1  # raise it when the written files change, so that older folders are rebuilt
REQUIREMENTS = {"TPTBox": "TPTBox==1.1.0", "nilearn": "nilearn==0.14.1"}

# Labels of TPTBox's masks. Vertebra v has value v, the disc below it 100 + v. In the sub-region
# masks, 41 is the arch, 42 the spinous process, 43 and 44 the costal, 45 to 48 the articular
# processes, 49 and 50 the body.
PARTS = {"corpus": (49, 50), "posterior_elements": tuple(range(41, 49))}
HALF = 128  # of the tissue maps' 255

CT = "TPTBox/tests/sample_ct/sub-ct"
MR = "TPTBox/tests/sample_mri/sub-mri"
MNI = "nilearn/datasets/data/mni_icbm152"
# Paths in the installed packages; the first part is the package's import name.
SOURCES = {
    "spine_ct": f"{CT}_label-22_ct.nii.gz",
    "spine_ct_vertebrae": f"{CT}_seg-vert_label-22_msk.nii.gz",
    "spine_ct_regions": f"{CT}_seg-subreg_label-22_msk.nii.gz",
    "spine_mr": f"{MR}_label-6_T2w.nii.gz",
    "spine_mr_vertebrae": f"{MR}_seg-vert_label-6_msk.nii.gz",
    "spine_mr_regions": f"{MR}_seg-subreg_label-6_msk.nii.gz",
    "brain_mni": f"{MNI}_t1_tal_nlin_sym_09a_converted.nii.gz",
    "grey_matter": f"{MNI}_gm_tal_nlin_sym_09a_converted.nii.gz",
    "white_matter": f"{MNI}_wm_tal_nlin_sym_09a_converted.nii.gz",
}
SHA256 = {
    "spine_ct": "51e09da4b00f8a22c17bfc55f63b8c21d2a9f6f1d3e4044143f29e12744abec9",
    "spine_ct_vertebrae": "e5529ffb420d83be69c5fc0fbac4b6990bcaa067a5c0939fc7d705c47527ea1d",
    "spine_ct_regions": "afb7fdf9770ac460e7ca50b5d2b13aeb2d13e44d179424a48750049b177e93b5",
    "spine_mr": "961495b42cdfc02eaf50eb3f471d705793b82802fedb05f5f02aa5367528cf44",
    "spine_mr_vertebrae": "14ee727a3f565512ddbf0c9d8ce8d9ce127acc43f0d21bc7771c2fcbd343023a",
    "spine_mr_regions": "34c7a3ddccee7b502951d96e0ccc0bf7498ff3f9c47a7bdfcefb51a7e3ca2785",
    "brain_mni": "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6",
    "grey_matter": "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed",
    "white_matter": "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db",
}
IMAGES = {"spine_ct": "ct.nii.gz", "spine_mr": "mri.nii.gz", "brain_mni": "mri.nii.gz"}

README = """\
Three cases in TotalSegmentator layout, written by fastlora.medical.data.bundled from installed
packages. manifest.json holds the SHA-256 of each source file and of each file written.

spine_ct, spine_mr: the sample crops in the tests of TPTBox 1.1.0
  (https://github.com/Hendrik-code/TPTBox, Apache-2.0), a CT and a T2w MR image at 1.5 mm, named
  sub-ct and sub-mri there and treated as two people here; the package does not say. The number in a
  structure's name is the value in the package's mask, not a checked anatomical level: vertebra_6 of
  spine_mr would be C6 in the package's own table, but has the size of a lumbar vertebra. Vertebrae
  22 and 6 and the two discs lie completely in the image; vertebrae 21, 23, 5 and 7 are cut off by
  the crop. The masks are the package's, which does not document how they were made.
brain_mni: the MNI ICBM152 2009a symmetric T1w template, brain only, as shipped in nilearn 0.14.1
  (BSD-3-Clause, https://nilearn.github.io), 1 mm: an average of 152 people, not a subject.
  grey_matter and white_matter are the voxels of its tissue probability maps at 0.5 or more. Since
  it is symmetric, left predicts right. nilearn gives the licence of the template as unknown. The
  notice that the Montreal Neurological Institute distributes with its ICBM152 2009 templates reads:

  Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
  Institute, McGill University. Permission to use, copy, modify, and distribute this software and
  its documentation for any purpose and without fee is hereby granted, provided that the above
  copyright notice appear in all copies. The authors and McGill University make no representations
  about the suitability of this software for any purpose. It is provided "as is" without express or
  implied warranty. The authors are not responsible for any data loss, equipment damage, property
  loss, or injury to subjects or patients resulting from the use or misuse of this software package.

Not for clinical use.
"""


def build_bundled(root: str | os.PathLike[str]) -> list[Case]:
    """Write the three bundled cases to a folder, unless it already holds them, and list them.

    Raises: DataError if a package is missing or its files differ (naming what to install), or if
    the folder holds anything else.
    """
    sources = {path: SHA256[name] for name, path in SOURCES.items()}
    recipe = {"layout_version": LAYOUT_VERSION, "sources": sources}
    return find_cases(generate_folder(root, recipe, _write))


def locate(name: str) -> Path:
    """The file of an entry of `SOURCES` in its installed package, which is not imported.

    Raises: DataError if the package or the file is missing, or if the file's SHA-256 differs.
    """
    source = SOURCES[name]
    package, _, inside = source.partition("/")
    install = f"pip install --no-deps {REQUIREMENTS[package]}"
    spec = importlib.util.find_spec(package)  # of a top-level name: finds the folder, runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"bundled data: expected the package {package}, got none installed: {install}"
        )
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise DataError(f"bundled data: expected {source}, got a {package} without it: {install}")
    found = sha256(path)
    if found != SHA256[name]:
        raise DataError(
            f"bundled data: expected {source} with SHA-256 {SHA256[name][:12]}…, "
            f"got {found[:12]}…: {install}"
        )
    return path


def _write(folder: Path) -> None:
    files = {name: locate(name) for name in SOURCES}
    for case, image in IMAGES.items():
        (folder / case / "segmentations").mkdir(parents=True)
        shutil.copyfile(files[case], folder / case / image)
    for case, vertebrae, discs in (
        ("spine_ct", (21, 22, 23), ()),
        ("spine_mr", (5, 6, 7), (105, 106)),
    ):
        labels = nib.load(files[f"{case}_vertebrae"])
        vertebra = np.asanyarray(labels.dataobj)
        region = np.asanyarray(nib.load(files[f"{case}_regions"]).dataobj)
        for v in discs:
            _save_mask(folder / case, f"disc_{v}", vertebra == v, labels.affine)
        for v in vertebrae:
            _save_mask(folder / case, f"vertebra_{v}", vertebra == v, labels.affine)
            for part, values in PARTS.items():
                mask = (vertebra == v) & np.isin(region, values)
                _save_mask(folder / case, f"vertebra_{v}_{part}", mask, labels.affine)
    for tissue in ("grey_matter", "white_matter"):
        image = nib.load(files[tissue])
        mask = np.asanyarray(image.dataobj) >= HALF
        _save_mask(folder / "brain_mni", tissue, mask, image.affine)
    (folder / "README.txt").write_text(README, encoding="utf-8")
    (folder / "meta.csv").write_text(
        "image_id;image_type;source\n"
        + "".join(f"{c};{image.split('.')[0]};{SOURCES[c]}\n" for c, image in IMAGES.items()),
        encoding="utf-8",
    )


def _save_mask(case: Path, name: str, mask: Mask, affine: FloatArray) -> None:
    save_volume(case / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
