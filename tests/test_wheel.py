"""The wheel holds what its commands need: the package, the launchers and the arms that a sweep overlays."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT

LISTED = "from launchers import sweep; print(sweep.__file__); print(*sorted(p.name for p in sweep.ARMS.glob('*.yaml')))"


def test_the_wheel(tmp_path):
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("mdmtrain", "launchers", "configs", "tests", "tools"):  # the last two must stay out
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(unpacked)

    def files(folder: Path) -> set[str]:
        names = ("mdmtrain", "launchers", "configs")
        found = [file for name in names for file in (folder / name).rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)) for file in found if "__pycache__" not in file.parts}

    assert files(unpacked) == files(ROOT)
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {
        "mdmtrain", "launchers", "configs"
    }  # fmt: skip
    assert {"mdmtrain/py.typed", "launchers/py.typed"} <= files(unpacked)
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", LISTED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    where, arms = done.stdout.splitlines()
    assert where == str(unpacked / "launchers/sweep.py")
    assert arms.split() == sorted(path.name for path in (ROOT / "configs/arms").glob("*.yaml"))
