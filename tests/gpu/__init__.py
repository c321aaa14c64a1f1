"""The code of a GPU run, without a GPU. This file imports no torch, because shim.py must run before torch is loaded."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools"), str(ROOT / "tools/bench")]  # the modules there import each other by these names
