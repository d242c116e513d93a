"""Installs a real mmdet beside the PyTorch that is here, which no wheel of mmcv fits any more.

    python examples/mmdet/install_mmdet.py

mmdet 3.3.0 needs mmcv below 2.2 with compiled operators. mmcv publishes its source only, and asks its
compiler for C++14 or 17 where PyTorch's headers now need C++20. So this downloads the source, asks for
C++20, builds a wheel (some minutes), keeps it for the next time, and installs it with mmdet and mmengine
into the Python that runs this script. Operators for GPUs are built too where PyTorch sees one, which takes
a CUDA toolkit of PyTorch's own version and longer. Where OpenCV can't be imported, as on servers
without graphics libraries, its headless build takes its place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MMCV, MMDET, MMENGINE = "mmcv==2.1.0", "mmdet==3.3.0", "mmengine==0.10.7"
# mmcv's build and mmengine's configs import pkg_resources, which setuptools dropped in 82.
SETUPTOOLS = "setuptools<82"
BUILD_TOOLS = (SETUPTOOLS, "wheel", "ninja", "psutil")
OUTDATED_STANDARDS, STANDARD = ("-std=c++14", "-std=c++17"), "-std=c++20"
# The compiled operators, and a config by its name.
PROBE = """
import mmdet, mmcv._ext
from mmcv.ops import nms
from mmengine.hub import get_config
get_config("mmdet::gfl/gfl_r50_fpn_1x_coco.py")
print("mmdet", mmdet.__version__, "is ready")
"""


def main() -> None:
    """Builds mmcv unless a wheel of it is kept, and installs it with mmdet."""
    options = parse_options()
    kept = options.cache / build_name()
    if not wheels_in(kept):
        build_mmcv(kept, options.jobs)
    (wheel,) = wheels_in(kept)
    print(f"mmcv from {wheel}")
    pip("install", str(wheel), MMDET, MMENGINE, SETUPTOOLS)
    if subprocess.run([sys.executable, "-c", "import cv2"], check=False).returncode:
        replace_opencv()
    subprocess.run([sys.executable, "-c", PROBE], check=True)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--cache", type=Path, default=home / "crosskd", help="keeps the wheel here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    return parser.parse_args()


def build_name() -> str:
    """What a built wheel fits: one PyTorch, one Python, one kind of machine."""
    try:
        import torch
    except ImportError:
        raise SystemExit("PyTorch is missing, which mmcv is built against: install crosskd first") from None
    kind = f"cuda{torch.version.cuda}" if torch.cuda.is_available() else "cpu"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"{MMCV.replace('==', '-')}-torch-{torch.__version__}-{kind}-{python}"


def wheels_in(folder: Path) -> list[Path]:
    """The wheel that an earlier build left, if any."""
    return sorted(folder.glob("mmcv-*.whl"))


def build_mmcv(kept: Path, jobs: int) -> None:
    """Downloads mmcv's source, lets it ask for C++20, and builds a wheel into the folder ``kept``."""
    pip("install", *BUILD_TOOLS)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip("download", "--no-deps", "--no-build-isolation", "--no-binary", "mmcv", "--dest", folder, MMCV)
        (archive,) = work.glob("mmcv-*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(work, filter="data")
        source_folder = archive.with_name(archive.name.removesuffix(".tar.gz"))
        ask_for_current_standard(source_folder / "setup.py")
        built = work / "built"
        # No debug information: it makes the wheel twenty times larger.
        environment = {"MMCV_WITH_OPS": "1", "MAX_JOBS": str(jobs), "CFLAGS": "-g0"}
        arguments = ("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(built))
        pip(*arguments, str(source_folder), environment=environment)
        keep(built, kept)


def ask_for_current_standard(setup: Path) -> None:
    """Changes the C++ standard that mmcv's setup script names."""
    text = setup.read_text()
    if not any(standard in text for standard in OUTDATED_STANDARDS):
        raise SystemExit(f"{setup} names none of {OUTDATED_STANDARDS}: this is not the source of {MMCV}")
    for standard in OUTDATED_STANDARDS:
        text = text.replace(standard, STANDARD)
    setup.write_text(text)


def keep(built: Path, kept: Path) -> None:
    """Moves a finished wheel to where it is kept, in one step, so that half a wheel is never found."""
    kept.mkdir(parents=True, exist_ok=True)
    (wheel,) = wheels_in(built)
    arriving = kept / f".{wheel.name}.{os.getpid()}"
    arriving.write_bytes(wheel.read_bytes())
    arriving.replace(kept / wheel.name)


def replace_opencv() -> None:
    """Replaces OpenCV by its build without windows, which needs no graphics libraries of the system."""
    pip("uninstall", "--yes", "opencv-python")
    pip("install", "opencv-python-headless")


def pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    """Runs pip of the Python that runs this."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **(environment or {})})


if __name__ == "__main__":
    main()
