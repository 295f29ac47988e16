"""The distribution: its name and metadata, the wheel and the sdist, citation and the files of .github."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib

import fastlora
from fastlora.installation import DISTRIBUTION
from tests.support.checkout import copy_checkout
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S
from tests.test_layout import TOP_LEVEL

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
ALL = sorted(TOP_LEVEL | {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"})
TEXTS = [
    *(ROOT / name for name in ALL if (ROOT / name).is_file()),
    *(
        path
        for folder in ("fastlora", "scripts", "docs", "benchmarks", ".ci", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".sh", ".md", ".yml", ".yaml"}
    ),
]
OTHER_PROJECT = re.compile(r"pip3? install[^\n`]*[\s'\"]fastlora(?![-\w./])")
# setuptools says this if there was nothing to leave out.
HARMLESS = r"no previously-included files matching '\*\.py\[cod\]'|byte-compiling is disabled"


def test_the_wheel_lists_every_package():
    folders = {file.parent for file in (ROOT / "fastlora").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == packages | {"fastlora.kernels"}


def test_the_distribution_is_not_the_other_project():
    assert PROJECT["name"] == DISTRIBUTION == "fastlora-torch"
    assert set(PROJECT["scripts"]) == {"fastlora", "fastlora-medical"}


def test_no_text_installs_the_other_project():
    found = {path.name: OTHER_PROJECT.findall(path.read_text()) for path in TEXTS}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("pip install 'fastlora[export]'", True),
        ("pip install -U fastlora", True),
        ("pip install 'fastlora-torch[export]'", False),
    ],
)
def test_what_counts_as_the_other_project(line, is_wrong):
    assert bool(OTHER_PROJECT.search(line)) == is_wrong


def test_every_extra_that_a_text_installs_exists():
    extra = re.compile(r"pip install[^\n`]*?'(?:fastlora-torch|\.)\[([a-z,]+)\]'")
    named = {
        name
        for path in TEXTS
        for found in extra.findall(path.read_text())
        for name in found.split(",")
    }
    assert {"export", "medical"} <= named <= set(PROJECT["optional-dependencies"])


def test_the_description_on_pypi_needs_no_other_file():
    text = (ROOT / PROJECT["readme"]).read_text()
    assert all("://" in link for link in re.findall(r"\]\(([^)]*)\)", text))
    example = re.search(r"^```python\n.*?^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    assert example is not None and example[0] in text


def test_the_citation_has_the_fields_of_its_schema():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == fastlora.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def test_the_workflows_run_targets_of_the_makefile():
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    workflows = {file.stem: yaml.safe_load(file.read_text()) for file in files}
    used = {
        step["run"]
        for workflow in workflows.values()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if step.get("run", "").startswith("make ")
    }
    assert {"make lint", "make test", "make dist"} <= used
    assert {command.removeprefix("make ") for command in used} <= targets
    for version in workflows["check"]["jobs"]["test"]["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    publish = workflows["publish"]
    assert set(publish[True]) == {"workflow_dispatch"}  # YAML reads the key `on` as true
    assert publish["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert publish["permissions"] == {"contents": "read"}


def test_the_issue_forms_have_what_github_requires():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yml")}
    assert forms.pop("config") == {"blank_issues_enabled": False}
    assert forms.keys() == {"bug", "performance", "question"}
    for form in forms.values():
        assert form["name"] and form["description"]
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields) > 0
    assert "python -m fastlora.bench" in (folder / "performance.yml").read_text()


def build(folder, moment, *arguments):
    """Build `folder` with all file times at `moment`; SOURCE_DATE_EPOCH sets the time in the wheel. Returns what was printed."""
    for file in folder.rglob("*"):
        os.utime(file, (moment, moment), follow_symlinks=False)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *arguments],
        cwd=folder,
        timeout=TIME_LIMIT_S,
        capture_output=True,
        text=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A checkout with its link, the archives of `make dist` in dist/, and what the build printed."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("first") / "copy"
    copy_checkout(copy, None, *ALL)
    (copy / "fastlora" / "kernels").symlink_to("../kernels")
    return copy, build(copy, 1_600_000_000)


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = (built[0] / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(built):
    (found,) = (built[0] / "dist").glob("*.tar.gz")
    return found


@pytest.mark.slow
def test_the_archives_are_built_without_warnings_and_pass_twine(built, wheel, sdist):
    pytest.importorskip("twine")
    stem = f"fastlora_torch-{fastlora.__version__}"
    assert wheel.name == f"{stem}-py3-none-any.whl" and sdist.name == f"{stem}.tar.gz"
    told = [line for line in built[1].splitlines() if re.search("warning|deprecat|!!", line, re.I)]
    assert [line for line in told if not re.search(HARMLESS, line)] == []
    check = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


@pytest.mark.slow
def test_a_wheel_is_the_same_from_a_checkout_without_symbolic_links(wheel, tmp_path):
    """Byte for byte, at another time, and without an sdist between."""
    copy = tmp_path / "copy"
    copy_checkout(copy, "../kernels", "pyproject.toml", "LICENSE", ".ci", "fastlora", "kernels")
    build(copy, 1_750_000_000, "--wheel")
    assert (copy / "dist" / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_the_sdist_has_every_file_of_the_checkout(built, sdist):
    made = {"PKG-INFO", "setup.cfg"}
    with tarfile.open(sdist) as archive:
        assert not any(member.issym() or member.islnk() for member in archive)
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()} - made
    files = {
        path.relative_to(built[0]).as_posix()
        for name in ALL
        for path in (
            [built[0] / name] if (built[0] / name).is_file() else (built[0] / name).rglob("*")
        )
        if path.is_file() and "fastlora/kernels/" not in path.as_posix()
    }
    assert {name for name in names if ".egg-info/" not in name} == files


@pytest.mark.slow
def test_tests_run_from_the_sdist(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    tests = ["tests/io/test_adapter_state.py", "tests/kernels/test_launch.py"]
    tests += ["tests/test_layout.py::test_kernels_import_nothing_of_fastlora_and_are_not_a_package"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


PROGRAM = """
import torch, fastlora, fastlora.kernels.config
from fastlora.medical.models.decoder import load_base_model
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
assert fastlora.inject_lora(model, ["0"], rank=2) == 1
load_base_model()
print(fastlora.__file__)
"""


@pytest.mark.slow
def test_the_wheel_works_in_a_bare_venv(wheel, tmp_path):
    """Installed without the source tree; torch, numpy, safetensors and triton come from this interpreter."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=TIME_LIMIT_S)
    scripts = venv / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=TIME_LIMIT_S, capture_output=True)
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (own,) = {path.parent for path in venv.rglob("fastlora/__init__.py")}
    (own.parent / "lent.pth").write_text("\n".join(lent))

    def run(*command):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run(python, "-W", "ignore", "-c", PROGRAM).strip()).parent == own
    assert run(python, "-m", "fastlora", "--help") == run(str(scripts / "fastlora"), "--help")
    assert run(str(scripts / "fastlora-medical"), "--version").strip() == fastlora.__version__


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    (entries,) = (name for name in names if name.endswith("entry_points.txt"))
    assert "fastlora = fastlora.cli.commands:main" in archive.read(entries).decode()
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fastlora").rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".pyo"} and path.name != "kernels"
    }
    ours |= {
        f"fastlora/kernels/{file.name}"
        for file in (ROOT / "kernels").glob("*.[cp]*")
        if file.is_file()
    }
    assert {name for name in names if ".dist-info/" not in name} == ours
