"""Other modules of the name fastlora, and the kernels of a checkout without symbolic links."""

import os
import re
import subprocess
import sys
import warnings

import pytest

from fastlora.errors import FastLoRAWarning
from fastlora.installation import install_hint, warn_of_namesakes
from tests.support.checkout import copy_checkout
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

PACKAGE = ROOT / "fastlora"


def put_other(folder, distribution=None, files="fastlora.py"):
    """A module fastlora.py in `folder`, and with `distribution` the metadata that pip writes for it."""
    folder.mkdir(exist_ok=True)
    (folder / "fastlora.py").write_text("OTHER = True\n")
    if distribution is not None:
        info = folder / f"fastlora-{distribution}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: fastlora\nVersion: {distribution}\n"
        )
        (info / "RECORD").write_text(f"{files},,\n{info.name}/METADATA,,\n")
    return folder


def messages(monkeypatch, *path):
    monkeypatch.setattr(sys, "path", list(path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_namesakes(PACKAGE)
    assert all(warning.category is FastLoRAWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_no_other_module_no_warning(monkeypatch, tmp_path):
    (tmp_path / "fastlora").mkdir()  # a folder of the name is no module
    (tmp_path / "fastlora.py").mkdir()
    path = ("", str(tmp_path), str(tmp_path / "absent"), str(tmp_path / "a.zip"), tmp_path)
    assert messages(monkeypatch, *path) == []
    assert messages(monkeypatch, *sys.path) == []


@pytest.mark.parametrize("before", [True, False])
def test_the_other_project_is_named_wherever_it_is(monkeypatch, tmp_path, before):
    other = str(put_other(tmp_path / "site", "4.2.1"))
    path = [other, str(ROOT)] if before else [str(ROOT), other, other]
    (message,) = messages(monkeypatch, *path)
    assert message.startswith(f"{tmp_path}/site/fastlora.py has the name of the package {PACKAGE}")
    assert "fastlora 4.2.1, another project than fastlora-torch" in message
    assert "`pip uninstall fastlora`" in message and "Rename" not in message


def test_the_current_folder_counts(monkeypatch, tmp_path):
    monkeypatch.chdir(put_other(tmp_path / "here", "4.2.1"))
    (message,) = messages(monkeypatch, "")
    assert message.startswith(f"{tmp_path}/here/fastlora.py has") and "fastlora 4.2.1" in message


@pytest.mark.parametrize("files", [None, "fastlora/__init__.py"])
def test_a_file_of_the_users_is_not_said_to_be_installed(monkeypatch, tmp_path, files):
    """The second: this package, installed under its former name, is not the owner of the file."""
    other = put_other(tmp_path / "mine", None if files is None else "0.1.0", files)
    (message,) = messages(monkeypatch, str(other))
    assert message.endswith("Rename or remove it.") and "uninstall" not in message


def test_several_are_all_named(monkeypatch, tmp_path):
    folders = [str(put_other(tmp_path / name)) for name in ("a", "b")]
    assert [message.split("/fastlora.py")[0] for message in messages(monkeypatch, *folders)] == (
        folders
    )


def test_the_hint_names_both_ways_to_install():
    assert install_hint("yaml") == (
        "pip install 'fastlora-torch[yaml]', in a checkout pip install '.[yaml]'"
    )


@pytest.mark.slow
def test_the_warning_points_at_the_import(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\n\nimport fastlora\nprint(fastlora.__file__)\n")
    other = put_other(tmp_path / "site", "4.2.1")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(other)))},
    )
    assert done.stdout.strip() == str(PACKAGE / "__init__.py"), done.stderr
    first = done.stderr.splitlines()[0]
    assert re.match(rf"{re.escape(str(script))}:3: FastLoRAWarning: {other}/fastlora.py has", first)


PROGRAM = """
import pickle
import fastlora, fastlora.kernels.launch
from fastlora.kernels.config import Tiles
from fastlora.kernels import recording
print(fastlora.__file__)
print(fastlora.kernels.launch.__file__)
print(fastlora.kernels.config.Tiles is pickle.loads(pickle.dumps(Tiles)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("instead", [None, "../kernels"])
def test_a_checkout_without_symbolic_links_has_its_kernels(tmp_path, instead):
    """None: an sdist. The text: what git writes with core.symlinks=false."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    copy = tmp_path / "copy"
    copy_checkout(copy, instead, "fastlora", "kernels")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        env={**os.environ, "PYTHONPATH": str(copy)},
    )
    assert done.returncode == 0, done.stderr
    files = [str(copy / "fastlora" / "__init__.py"), str(copy / "kernels" / "launch.py")]
    assert done.stdout.split() == [*files, "True"]


def test_the_kernels_of_another_package_are_not_taken(monkeypatch, tmp_path):
    from fastlora.installation import provide_kernels

    (tmp_path / "kernels").mkdir()  # as Hugging Face's, in the same site-packages
    (tmp_path / "kernels" / "__init__.py").touch()
    before = sys.modules["fastlora.kernels"]
    provide_kernels(tmp_path / "fastlora")
    assert sys.modules["fastlora.kernels"] is before


# Those that need no medical packages; tests/ops/test_parity.py does.
PARTS = ("kernels", "ops", "model", "layers", "benchmark")


@pytest.mark.slow
def test_the_tests_are_collected_under_a_triton_without_descriptors(tmp_path):
    """As Triton before 3.4 is: the files that import kernels are left out."""
    (tmp_path / "without_descriptors.py").write_text(
        "import sys\n\n\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'triton.tools.tensor_descriptor':\n"
        "            raise ModuleNotFoundError(name)\n\n\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    options = [
        "-q",
        "--ignore=tests/ops/test_parity.py",
        "-p",
        "without_descriptors",
        "-p",
        "no:cacheprovider",
        "--collect-only",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{part}" for part in PARTS)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert "tests/ops/test_linear.py" in run.stdout and "tests/kernels" not in run.stdout
