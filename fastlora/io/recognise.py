"""Which format an adapter file has, by its first bytes and the names of its tensors; what is known but not supported is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from fastlora.errors import CheckpointError, first_few
from fastlora.files import read_torch
from fastlora.io.kohya_names import is_kohya
from fastlora.io.safetensors_format import PEFT_PREFIX, Contents, read_safetensors

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NOT_LOW_RANK = "its update is not a product B A"
_OTHER_FACTORS = "its update has other factors than B A"
_NO_UPDATE = "it does not change weights"
# (what it is, a regex of its keys, PEFT's type, why it is not supported)
_UNSUPPORTED = (
    ("LoHa", r"(^|\.)hada_[wt][12]", "LOHA", "its update is a product by elements"),
    ("LoKr", r"(^|\.)lokr_[wt][12]", "LOKR", "its update is a Kronecker product"),
    ("LoCon with a core tensor", r"\.lora_mid(\.|$)", "", "its update has three factors"),
    ("IA3", r"(^|\.)ia3_l(\.|$)|\.on_input$", "IA3", "it scales activations"),
    ("AdaLoRA", r"\.lora_E(\.|$)|\.ranknum$", "ADALORA", "its update has singular values"),
    ("VeRA", r"\.vera_lambda_[bd]|(^|\.)vera_[AB](\.|$)", "VERA", _OTHER_FACTORS),
    ("RandLoRA", r"\.randlora_", "RANDLORA", _OTHER_FACTORS),
    ("VB-LoRA", r"\.vblora_", "VBLORA", _OTHER_FACTORS),
    ("OFT", r"(^|\.)oft_(r|R|blocks|diag)(\.|$)", "OFT", "it rotates weights"),
    ("BOFT", r"(^|\.)boft_[RS](\.|$)", "BOFT", "it rotates weights"),
    ("HRA", r"\.hra_", "HRA", "it reflects weights"),
    ("FourierFT", r"\.fourierft_", "FOURIERFT", _NOT_LOW_RANK),
    ("C3A", r"\.c3a_", "C3A", _NOT_LOW_RANK),
    ("Bone or MiSS", r"\.(bone|miss)_", "MISS", _NOT_LOW_RANK),
    ("SHiRA", r"\.shira_", "SHIRA", _NOT_LOW_RANK),
    ("RoAd", r"\.road_", "ROAD", "it rotates activations"),
    ("prompt or prefix tuning", r"^prompt_(embeddings|encoder)", "PREFIX_TUNING", _NO_UPDATE),
    ("LLaMA-Adapter", r"(^|\.)adaption_(prompt|gate)", "ADAPTION_PROMPT", _NO_UPDATE),
    (
        "textual inversion",
        r"^(emb_params|string_to_param|string_to_token|clip_[lg])$",
        "",
        _NO_UPDATE,
    ),
    ("LoRA with differences in full", r"\.(diff|diff_b|w_norm|b_norm)$", "", _NOT_LOW_RANK),
    (
        "DoRA file of LyCORIS",
        r"\.dora_scale$",
        "",
        "its norms are of rows in some files and of columns in others",
    ),
    ("LoRA with biases", r"\.lora_(B|up)(\.\w+)?\.bias$", "", "fastlora's B has no bias"),
    ("Control-LoRA", r"^lora_controlnet$", "", "it holds parts of another model"),
)
_DIFFUSERS = re.compile(
    r"(^|\.)lora_[AB]\.weight$|(\.lora|\.lora_linear_layer|\.to_(q|k|v|out)_lora)\.(down|up)\.weight$"
    r"|\.lora_(down|up)\.weight$"
)
_TORCHTUNE = re.compile(r"(^|\.)lora_[ab]\.weight$")
_OWN = re.compile(r"(^|[._])lora_")
# First bytes -> what the file is and why it is not read.
_SIGNATURES = {
    b"GGUF": ("a GGUF file", "llama.cpp quantises its tensors and names them anew"),
    b"\x89HDF": ("an HDF5 file", "only safetensors and files of torch.save are read"),
    b"\x80": ("a pickle", "reading it may run code; save it as safetensors"),
    b"cos\n": ("a pickle", "reading it may run code; save it as safetensors"),
    b"version https://git-lfs": ("a pointer of Git LFS", "the file itself was not downloaded"),
    b"<": ("an HTML or XML page", "it is not the file that was to be downloaded"),
}


def read_contents(file: Path) -> Contents:
    """The tensors of a safetensors file, or of a file of torch.save (.pt, .pth, .bin, .ckpt), which is read without running code.

    Raises: CheckpointError in one line if the file is damaged, holds something else, or is of a known format that is not supported.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(24)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    for signature, (what, reason) in _SIGNATURES.items():
        if start.startswith(signature) and not start[8:].startswith(b"{"):
            raise CheckpointError(
                f"{file}: is {what}: not supported because {reason}; keys: not read"
            )
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix not in _TORCH_SUFFIXES:
        raise CheckpointError(
            f"{file}: expected a .safetensors file, one of torch.save ({', '.join(_TORCH_SUFFIXES)}) or a folder in PEFT's format"
        )
    try:
        value = read_torch(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable state dict: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected tensors by name, got {type(value).__name__}")
    other = [
        key for key, t in value.items() if not (isinstance(key, str) and isinstance(t, Tensor))
    ]
    if other:
        keys = first_few([str(key) for key in value])
        raise CheckpointError(
            f"{file}: is a checkpoint: not supported because {str(other[0])!r} is no tensor; keys: {keys}"
        )
    return Contents({key: tensor.contiguous() for key, tensor in value.items()}, {})


def format_of(file: Path, contents: Contents) -> str:
    """The format by the names of the tensors: "fastlora" (or loralib's or PEFT's file), "diffusers", "kohya" or "torchtune".

    Raises: CheckpointError naming the format if it is not supported, or if there is no adapter.
    """
    keys = list(contents.tensors)
    for what, pattern, _, reason in _UNSUPPORTED:
        found = [key for key in keys if re.search(pattern, key)]
        if found and not contents.layers:
            _refuse(file, f"a {what} file", reason, found)
    if any(is_kohya(key) for key in keys):
        return "kohya"
    if any(_TORCHTUNE.search(key) for key in keys):
        return "torchtune"
    if any(_DIFFUSERS.search(key) and not key.startswith(PEFT_PREFIX) for key in keys):
        return "diffusers"
    if keys and not any(_OWN.search(key) for key in keys):
        what = f"a file of {len(keys)} plain tensors, as a full model's"
        _refuse(file, what, "it holds no lora_A and lora_B, so it is not an adapter", keys)
    return "fastlora"


def refuse_type(folder: Path, config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raises: CheckpointError naming the type of a PEFT folder, if it is another than LoRA. config: of its adapter_config.json."""
    kind = config.get("peft_type")
    if kind == "LORA" or not isinstance(kind, str):
        return
    reasons = {name: reason for _, _, name, reason in _UNSUPPORTED if name}
    reasons |= dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), _NO_UPDATE)
    reason = reasons.get(kind, "fastlora reads peft_type 'LORA' only")
    _refuse(folder, f"a PEFT adapter of type {kind}", reason, keys)


def _refuse(file: Path, what: str, reason: str, keys: Iterable[str]) -> NoReturn:
    shown = first_few(list(keys)) or "none"
    raise CheckpointError(f"{file}: is {what}: not supported because {reason}; keys: {shown}")
