"""The script that installs mmdet, without the network and without a compiler."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "mmdet" / "install_mmdet.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module; its folder has no place on the path, for it is named as mmdet is."""
    spec = importlib.util.spec_from_file_location("install_mmdet", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(script, monkeypatch) -> list[tuple[str, ...]]:
    """The commands that the script would have run, without the interpreter's name; all succeed."""
    ran: list[tuple[str, ...]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[0] == sys.executable
        ran.append(tuple(command[1:]))
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(script.subprocess, "run", run)
    return ran


def test_both_outdated_standards_become_the_current_one(script, tmp_path):
    setup = tmp_path / "setup.py"
    setup.write_text("args = {'cxx': ['-std=c++14']}\nif hip:\n    args = ['-std=c++17', '-O2']\n")
    script.ask_for_current_standard(setup)
    assert setup.read_text() == "args = {'cxx': ['-std=c++20']}\nif hip:\n    args = ['-std=c++20', '-O2']\n"


def test_a_source_without_these_standards_is_refused_and_left_alone(script, tmp_path):
    setup = tmp_path / "setup.py"
    setup.write_text("args = ['-std=c++23']\n")
    with pytest.raises(SystemExit, match="names none of"):
        script.ask_for_current_standard(setup)
    assert setup.read_text() == "args = ['-std=c++23']\n"


def test_a_wheels_folder_names_what_it_fits(script, monkeypatch):
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = script.build_name()
    assert name == f"mmcv-2.1.0-torch-{torch.__version__}-cpu-{python}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert script.build_name() == name.replace("-cpu-", "-cuda13.0-")
    monkeypatch.setattr(torch, "__version__", "2.4.0")
    assert "torch-2.4.0-" in script.build_name()


def test_without_pytorch_the_script_says_what_to_install(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="install crosskd first"):
        script.build_name()


def test_keeping_a_wheel_leaves_nothing_else(script, tmp_path):
    built, kept = tmp_path / "built", tmp_path / "cache" / "mmcv-for-this"
    built.mkdir()
    (built / "mmcv-2.1.0-cp311.whl").write_bytes(b"a wheel")
    script.keep(built, kept)
    assert [path.name for path in kept.iterdir()] == ["mmcv-2.1.0-cp311.whl"]
    assert script.wheels_in(kept)[0].read_bytes() == b"a wheel"


def test_half_a_wheel_is_not_found(script, tmp_path, monkeypatch):
    built, kept = tmp_path / "built", tmp_path / "kept"
    built.mkdir()
    (built / "mmcv-2.1.0-cp311.whl").write_bytes(b"a wheel")

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.keep(built, kept)
    assert list(kept.iterdir())
    assert script.wheels_in(kept) == []


@pytest.fixture
def kept_wheel(script, tmp_path, monkeypatch) -> Path:
    """A wheel as an earlier build left it, in the folder that the script is told to look in."""
    wheel = tmp_path / script.build_name() / "mmcv-2.1.0-cp311.whl"
    wheel.parent.mkdir()
    wheel.touch()
    monkeypatch.setattr(sys, "argv", ["install_mmdet.py", "--cache", str(tmp_path)])
    return wheel


def test_a_kept_wheel_is_not_built_again(script, kept_wheel, commands):
    script.main()
    install, opencv, probe = commands
    assert install[-5:] == (
        *("install", str(kept_wheel), "mmdet==3.3.0", "mmengine==0.10.7"),
        "setuptools<82",  # mmengine needs it too, and a kept wheel's build didn't install it
    )
    assert opencv == ("-c", "import cv2")
    assert probe[0] == "-c"
    assert "mmcv._ext" in probe[1]


def test_an_opencv_that_needs_graphics_libraries_is_replaced(script, kept_wheel, commands, monkeypatch):
    succeeding = script.subprocess.run

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        finished = succeeding(command, **options)
        finished.returncode = int(command[-1] == "import cv2")
        return finished

    monkeypatch.setattr(script.subprocess, "run", run)
    script.main()
    assert [command[-1] for command in commands][1:4] == [
        *("import cv2", "opencv-python", "opencv-python-headless")
    ]
    assert "uninstall" in commands[2]


def test_the_cache_follows_the_desktop_convention(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["install_mmdet.py"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert script.parse_options().cache == tmp_path / "crosskd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert script.parse_options().cache == Path.home() / ".cache" / "crosskd"


def test_help_tells_what_the_script_is_for():
    shown = subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True, text=True)
    assert "C++20" in shown.stdout
    assert "--cache" in shown.stdout
