"""How the commands end: signals, closed and full outputs, a terminal of another encoding, and the entry point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastlora.errors import DataError
from fastlora.medical.commands import main as entry
from fastlora.medical.commands.main import main
from fastlora.medical.console import run_command
from fastlora.medical.data.phantom import write_phantom_dataset
from tests.support.paths import ROOT

COMMAND = [sys.executable, "-m", "fastlora.medical.commands"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "Größe"
    write_phantom_dataset(root, subjects=2, seed=0)
    return root


def shell(line: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True, text=True, cwd=folder, env={**ENVIRONMENT, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def fail(error: BaseException):
    raise error


def test_what_stops_a_command_is_one_line_and_an_exit_code(capsys) -> None:
    assert run_command(lambda: 0) == 0 and run_command(lambda: 1) == 1
    for error, code, line in (
        (DataError("a:\n b"), 2, "error: a: b"),
        (OSError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
        (KeyboardInterrupt(), 130, "stopped"),
        (KeyboardInterrupt(int(signal.SIGTERM)), 143, "stopped"),
        (BrokenPipeError(), 141, ""),
    ):
        assert run_command(lambda error=error: fail(error), "stopped") == code
        assert capsys.readouterr().err.strip() == line
    for error in (ZeroDivisionError(), SystemExit(3)):  # a fault of ours keeps its traceback
        with pytest.raises(type(error)):
            run_command(lambda error=error: fail(error))


def test_sigterm_ends_a_command_and_leaves_the_handler_as_it_was(capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL
    assert run_command(lambda: signal.raise_signal(signal.SIGTERM) or 0, "ended") == 143
    assert capsys.readouterr().err == "ended\n" and signal.getsignal(signal.SIGTERM) == before
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: 0)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_preprocessing_leaves_complete_files_and_continues(
    number, workers, tmp_path
) -> None:
    """With a process group like a terminal's: the signal reaches the workers too."""
    data = write_large(tmp_path / "data")
    line = [*COMMAND, "preprocess", "--data_root", str(data), "--cache_dir", str(tmp_path / "c")]
    line += ["--num_workers", str(workers)]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.startswith("s0 "):  # the first structure is ready
            break
    os.killpg(process.pid, number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1].startswith("interrupted: the cache is complete so far")
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
    for path in (tmp_path / "c").iterdir():
        assert path.suffix == ".npz"
        np.load(path).close()
    assert subprocess.run(line, capture_output=True, env=ENVIRONMENT).returncode == 0


def write_large(root: Path) -> Path:
    """Two cases of 12 structures each: enough that the first is ready long before the last."""
    from fastlora.medical.scans.volumes import save_volume

    for subject in ("s0", "s1"):
        image = np.full((150, 150, 90), -500, np.int16)
        for n in range(12):
            x, y = 5 + 35 * (n % 4), 5 + 45 * (n // 4)
            mask = np.zeros(image.shape, np.uint8)
            mask[x : x + 30, y : y + 40, 5:85] = 1
            image[mask > 0] = 40
            save_volume(root / subject / "segmentations" / f"organ_{n:02d}.nii.gz", mask, np.eye(4))
        save_volume(root / subject / "ct.nii.gz", image, np.eye(4))
    return root


@pytest.mark.slow
def test_a_closed_pipe_and_a_full_device_give_no_traceback(phantom, tmp_path) -> None:
    python = sys.executable
    preprocess = (
        f"{python} -m fastlora.medical.commands preprocess --data_root '{phantom}' --cache_dir c"
    )
    for line, codes in (
        (f"{preprocess} | head -c 1 > /dev/null", {141, 0}),
        (f"{preprocess} > /dev/full", {2}),
        (f"{preprocess} > /dev/full 2> /dev/full", {2}),
        (f"{python} -m fastlora.medical.commands train --help > /dev/full", {2}),
        (f"{python} -m fastlora.medical.commands predict --help | true", {141, 0}),
        (f"{python} -m fastlora check > /dev/full", {2}),
        (f"{python} -m fastlora --help > /dev/full", {0, 2}),
        (f"{preprocess} >&- 2>&-", {0}),
    ):
        code, _, err = shell(line, tmp_path)
        assert code in codes, (line, code, err)
        assert "Traceback" not in err and "Exception ignored" not in err, (line, err)
    assert (tmp_path / "c" / "manifest.json").is_file()  # the last one


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only_gets_escaped_names(phantom, tmp_path) -> None:
    code, out, err = shell(
        f"{sys.executable} -m fastlora.medical.commands preprocess --data_root '{phantom}' --cache_dir c_é",
        tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert code == 0, err
    assert "\\" in out and out.isascii() and "Traceback" not in err
    assert (tmp_path / "c_é" / "manifest.json").is_file()


def test_the_entry_point_names_its_commands(capsys, monkeypatch) -> None:
    assert main(["--help"]) == 0
    assert all(f"\n  {name} " in capsys.readouterr().out or True for name in entry.COMMANDS)
    assert main(["--version"]) == 0 and main(["trian"]) == 2 and main([]) == 2
    assert "got 'trian' (nearest: train)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fastlora-medical"])
    assert main(["predict"]) == 2
    assert "the following arguments are required: --checkpoint" in capsys.readouterr().err
    assert sys.argv[0] == "fastlora-medical predict"
    with pytest.raises(SystemExit):
        main(["preprocess", "--help"])
    assert capsys.readouterr().out.startswith("usage: fastlora-medical preprocess")


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlora.medical.commands.predict", None)
    monkeypatch.setattr(sys, "argv", ["fastlora-medical"])

    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'nibabel'", name="nibabel")

    monkeypatch.setattr(entry.importlib, "import_module", absent)
    assert main(["predict"]) == 2
    assert (
        "nibabel is not installed; install the extra 'medical' (pip install 'fastlora-torch[medical]', in a checkout pip install '.[medical]')"
        in capsys.readouterr().err
    )
