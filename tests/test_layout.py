"""Project rules that can be checked automatically: imports, the symbolic link fastlora/kernels, the public names."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlora
from tests.support.paths import ROOT
from tests.support.processes import TIME_LIMIT_S

# package or module of fastlora -> what it may import of fastlora besides itself; "medical" may also use the public names
MAY_IMPORT = {
    "errors": set(),
    "archive": set(),
    "installation": {"errors"},
    "files": {"errors", "archive"},
    "config": {"errors", "files"},
    "ops": {"errors", "installation", "files", "config", "kernels"},
    "layers": {"errors", "config", "ops"},
    "model": {"errors", "config", "ops", "layers"},
    "io": {"errors", "files", "config", "layers", "model"},
    "report": {"errors", "config", "ops", "layers", "model"},
    "peft": {"errors", "files", "config", "ops", "layers", "model", "io"},
    "benchmark": {"errors", "files", "ops", "layers", "report"},
    "cli": {"errors", "files", "config", "io", "peft", "benchmark"},
    "bench": {"cli"},
    "tune": {"ops"},
    "__main__": {"cli"},
    "medical": {"errors", "installation", "files"},
}
MEDICAL_MAY_IMPORT = {
    "console": set(),
    "scans": set(),
    "data": {"scans"},
    "models": {"scans", "data"},
    "sam3d": {"scans", "data", "models"},
    "training": {"scans", "data", "models", "sam3d"},
    "evaluation": {"console", "scans", "data", "models", "training"},
    "commands": {"console", "scans", "data", "models", "training", "evaluation"},
}

MAX_MODULE_LINES = 420
MAX_FUNCTION_LINES = 70

# module of fastlora that writes files itself -> why; all others write through `fastlora.files`
WRITES_ITSELF = {
    "files.py": "the writer",
    "cli/merge.py": "merges into a temporary copy of the weights, which is moved into place",
    "io/exporter.py": "saves into a temporary folder, whose files are moved into place",
    "medical/data/bundled.py": "fills a folder of `generated`",
    "medical/data/generated.py": "a folder is written elsewhere and moved into place",
    "medical/data/phantom.py": "fills a folder of `generated`",
    "medical/evaluation/results.py": "a folder of meshes is written elsewhere and moved into place",
    "medical/training/run_folder.py": "the lock of a run; the last checkpoint stays as the previous one",
}

PUBLIC = [
    "AccelerationReport",
    "BackendError",
    "CheckError",
    "CheckReport",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "DataError",
    "ExpertBank",
    "ExportError",
    "FastLoRAError",
    "FastLoRAWarning",
    "FusionReport",
    "InjectionError",
    "LoRAConfig",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALayer",
    "LayerTable",
    "LoRALinear",
    "LoRATransposedExperts",
    "LoRATransposedLinear",
    "LoadResult",
    "MemoryEstimate",
    "MergeError",
    "MergeReport",
    "TrainingError",
    "__version__",
    "accelerate",
    "active_adapter",
    "active_adapters",
    "adapt",
    "add_adapter",
    "base_state_dict",
    "check",
    "combine_adapters",
    "count_parameters",
    "delete_adapter",
    "disable_adapter",
    "estimate",
    "explain",
    "export",
    "freeze_base_params",
    "from_pretrained",
    "fuse",
    "get_lora_params",
    "get_lora_state_dict",
    "get_trainable_params",
    "inject_lora",
    "list_adapters",
    "load_adapter",
    "load_base_state_dict",
    "load_lora_state_dict",
    "lora_linear",
    "loraplus_groups",
    "merge_lora_weights",
    "merge_report",
    "merged_model",
    "named_lora_layers",
    "preview",
    "print_trainable_parameters",
    "reset_lora_parameters",
    "restore",
    "save_adapter",
    "save_pretrained",
    "set_adapter",
    "setup_lora_for_medical_finetuning",
    "unfuse",
    "use_adapter",
    "use_adapters",
]


TOP_LEVEL = {
    *("fastlora", "kernels", "benchmarks", "tests", "scripts", "docs"),
    *("pyproject.toml", "MANIFEST.in", "constraints.txt", "Makefile"),
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
}


def imports(file: Path) -> set[str]:
    """Dotted names of everything the file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(folder: Path) -> dict[str, list[Path]]:
    """The files of each package and module in `folder`."""
    found = {file.stem: [file] for file in folder.glob("*.py") if file.stem != "__init__"}
    packages = [path.parent for path in folder.glob("*/__init__.py")]
    return found | {path.name: sorted(path.rglob("*.py")) for path in packages}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git which files are tracked")
def test_nothing_new_is_at_the_top_level():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    names = {line.partition("/")[0] for line in done.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize(
    ("folder", "allowed"), [("fastlora", MAY_IMPORT), ("fastlora/medical", MEDICAL_MAY_IMPORT)]
)
def test_packages_import_only_earlier_packages(folder, allowed):
    found = packages(ROOT / folder)
    assert set(found) == set(allowed)
    prefix = folder.replace("/", ".") + "."
    for name, files in found.items():
        for file in files:
            names = {i.removeprefix(prefix) for i in imports(file) if i.startswith(prefix)}
            above = {n.split(".")[0] for n in names} - {name} - allowed[name]
            if name == "medical":
                above -= set(fastlora.__all__)
            assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_no_private_name_of_torch_is_imported():
    """Read where it is used, one that a version of torch lacks does not break the import of fastlora."""
    kept = {"torch.utils._pytree"}  # since torch 1.8
    for file in (ROOT / "fastlora").rglob("*.py"):
        names = {name for name in imports(file) if name.startswith("torch.")}
        private = {n for n in names if "._" in n and not n.startswith((*kept,))}
        assert not private, f"{file.relative_to(ROOT)} imports {private}"


def modules() -> dict[str, ast.Module]:
    """The syntax tree of each module of the library except the kernels, by its path below fastlora/."""
    folder = ROOT / "fastlora"
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.py"))]
    return {
        name: ast.parse((folder / name).read_text())
        for name in names
        if not name.startswith("kernels/")
    }


def test_modules_and_functions_are_short():
    lengths = {
        file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines())
        for folder in ("fastlora", "kernels")
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES} == {}
    functions = {
        f"{name}: {node.name}": node.end_lineno - node.lineno + 1
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in functions.items() if n > MAX_FUNCTION_LINES} == {}


def writes(tree: ast.Module) -> set[str]:
    """The calls that write, rename or copy a file by its path. Writing to a buffer or an open file does not count."""
    found = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = ast.unparse(call.func)
        name = function.rpartition(".")[2]
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        if name == "open":  # `open(path, mode)` or `path.open(mode)`
            texts = [a.value for a in arguments if isinstance(a, ast.Constant)]
            writing = any(re.fullmatch(r"[rwaxbt+]*[wax+][bt+]*", str(text)) for text in texts)
        elif name in {"savefig", "save", "save_file", "savez", "savez_compressed"}:
            target = ast.unparse(arguments[-1 if name == "save_file" else 0]) if arguments else ""
            writing = bool(re.search(r"path|folder|/", target))
        else:
            writing = name in {"write_text", "write_bytes", "rename", "to_filename", "tofile"}
            writing |= function in {"os.replace", "os.link", "shutil.move"}
            writing |= function.startswith("shutil.copy") and name != "copymode"
        if writing:
            found.add(ast.unparse(call))
    return found


def test_files_are_written_by_the_one_writer():
    found = {name: writes(tree) for name, tree in modules().items()}
    assert {name: w for name, w in found.items() if w and name not in WRITES_ITSELF} == {}


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("path.write_text(text)", True),
        ("(folder / 'a').write_bytes(b'')", True),
        ("open(path, 'w')", True),
        ("open(path, mode='xb')", True),
        ("path.open('r+b')", True),
        ("os.replace(new, old)", True),
        ("part.rename(path)", True),
        ("figure.savefig(path, dpi=80)", True),
        ("shutil.copytree(a, b)", True),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("figure.savefig(buffer, format='png')", False),
        ("np.savez(file, **arrays)", False),
        ("text.replace('a', 'w')", False),
        ("shutil.copymode(a, b)", False),
    ],
)
def test_what_counts_as_a_write(line, is_one):
    assert bool(writes(ast.parse(line))) == is_one


def test_there_are_no_import_cycles():
    """Imports for types only and inside functions count as well."""
    files = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
        for f in (ROOT / "fastlora").rglob("*.py")
    }
    graph = {
        name: {m for i in imports(f) for m in (i, i.rpartition(".")[0]) if m in files}
        - {"fastlora"}
        for name, f in files.items()
    }
    while graph:  # repeatedly remove modules that import nothing in the graph
        ends = {name for name, used in graph.items() if not used & graph.keys()}
        assert ends, f"a circle among {sorted(graph)}"
        graph = {name: used for name, used in graph.items() if name not in ends}


def test_every_package_has_its_tests_in_a_folder_of_its_name():
    packages = {
        f.parent.relative_to(ROOT / "fastlora") for f in (ROOT / "fastlora").rglob("*/__init__.py")
    }
    packages -= {Path(".")}
    folders = {f.parent.relative_to(ROOT / "tests") for f in (ROOT / "tests").rglob("test_*.py")}
    assert packages - {Path("medical")} <= folders


def test_kernels_import_nothing_of_fastlora_and_are_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "fastlora" / "kernels"
    if link.is_symlink():
        assert os.readlink(link) == os.path.join("..", "kernels")
    else:  # a checkout with core.symlinks=false has the link's text, an sdist nothing
        assert not link.exists() or link.read_text() == "../kernels"
    for file in (ROOT / "kernels").glob("*.py"):
        ours = {name for name in imports(file) if name.startswith("fastlora")}
        assert all(name.startswith("fastlora.kernels.") for name in ours), file


def test_import_needs_neither_triton_nor_the_medical_extras():
    program = """
import sys
for name in ("triton", "scipy", "nibabel", "matplotlib", "yaml", "peft", "transformers"):
    sys.modules[name] = None
import fastlora
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=TIME_LIMIT_S)


def test_transformers_imports_from_the_projects_root():
    # transformers looks for a package called `kernels`; with an __init__.py this folder would be imported instead.
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import transformers"],
        check=True,
        cwd=ROOT,
        timeout=TIME_LIMIT_S,
    )


def test_medical_exports_its_two_classes():
    from fastlora.medical import MedicalTrainer, TS_SAM3D_Dataset

    assert MedicalTrainer.__module__ == "fastlora.medical.training.trainer"
    assert TS_SAM3D_Dataset.__module__ == "fastlora.medical.data.slices"


def test_the_public_names_are_listed():
    assert sorted(fastlora.__all__) == sorted(PUBLIC)
    assert not any(inspect.ismodule(getattr(fastlora, name)) for name in PUBLIC)


def test_the_locks_have_the_pinned_versions_and_a_hash_for_each():
    text = (ROOT / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.M))
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    locked = set()
    for file in (ROOT / ".ci" / "locks").glob("*.txt"):
        for entry in re.split(r"\n(?=\S)", file.read_text().strip()):
            name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
            assert pinned.get(name, version) == version, f"{file.name}: {name}"
            locked.add(name)
    assert pinned.keys() - locked == {"torch", "triton"}


def test_every_dependency_is_in_the_list_of_licences():
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.M)
    page = (ROOT / "docs" / "licences.md").read_text()
    assert [name for name in names if f"| {name} | " not in page] == []


def test_every_mutant_can_be_applied(monkeypatch):
    """`scripts/mutate_kernels.py` replaces pieces of source that must be there."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from mutate_kernels import MUTANTS

    missing = [
        mutant.name
        for mutant in MUTANTS
        if (ROOT / mutant.file).read_text().count(mutant.old) <= mutant.nth
    ]
    assert missing == []
    places = re.search(r"in (\d+) places, one at a time", (ROOT / "docs/design.md").read_text())
    assert places is not None and int(places[1]) == len(MUTANTS)
