"""The code of docs/export.md runs and says the truth."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run(code, folder, monkeypatch, names=None):
    """The names that the Python blocks of `code` leave behind, run in `folder`; skips if a package they import is not there."""
    blocks = re.findall(r"^```python\n(.*?)^```$", code, flags=re.M | re.S)
    assert blocks
    for package in re.findall(r"^import (\w+)", "\n".join(blocks), flags=re.M):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(folder)
    names = {} if names is None else names
    for block in blocks:
        exec(compile(block, "docs", "exec"), names)
    return names


def sections(page):
    """Text by heading; what stands before the first is under ''."""
    text = (DOCS / page).read_text()
    first, *rest = re.split(r"^## ", text, flags=re.M)
    return {"": first} | dict(section.split("\n", 1) for section in rest)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it exports
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_export(tmp_path, monkeypatch):
    page = sections("export.md")
    names = run(page[""], tmp_path, monkeypatch)
    names = run(page["torch.export"], tmp_path, monkeypatch, names)
    expected = names["model"](names["x"]).detach()
    torch.testing.assert_close(names["y"], expected)
    names = run(page["Merged or not"], tmp_path, monkeypatch, names)
    names = run(page["TorchScript"], tmp_path, monkeypatch, names)
    torch.testing.assert_close(names["from_script"], expected)
    names = run(page["ONNX"], tmp_path, monkeypatch, names)
    torch.testing.assert_close(torch.from_numpy(names["from_onnx"]), expected)
