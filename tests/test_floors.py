"""The floors of docs/DESIGN.md, tested by walking the imports: they go down, or along ARROWS."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mdmtrain"

FLOORS = {
    **dict.fromkeys(["train", "generate", "answers"], 5),
    **dict.fromkeys(["evaluate", "likelihood", "unmask", "variance", "search", "cost"], 4),
    **dict.fromkeys(["command", "checkpoint", "monitor", "parallel"], 3),
    **dict.fromkeys(["model", "data", "optim", "muon"], 2),
    **dict.fromkeys(["diffusion", "config_help", "due"], 1),
    "config": 0,
    # Under config: they know nothing of runs. The last two are for supervisors too, without torch.
    **dict.fromkeys(["yaml12", "files", "exit_status"], -1),
}
ARROWS = {
    ("answers", "generate"),
    ("evaluate", "likelihood"),
    ("search", "cost"),
    ("command", "parallel"),
    ("checkpoint", "parallel"),
    ("monitor", "parallel"),
    ("optim", "muon"),
}
DIFFUSION_MAY_IMPORT = {"torch", "numpy", "scipy", "mdmtrain"} | set(sys.stdlib_module_names)


def imports(source: str, module: str) -> set[str]:
    """Full names of all modules that a module's source imports, wherever in it; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            found |= {".".join([*above, *([node.module] if node.module else []), alias.name]) for alias in node.names}
    return found


def unit(module: str) -> str:
    """The part of the package that a module belongs to: mdmtrain.data.loader -> data."""
    return [*module.split("."), ""][1]


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the floors."""
    bad, mine = [], unit(module)
    for name in sorted(imports(source, module)):
        top, theirs = name.split(".")[0], unit(name)
        if top in ("launchers", "tools", "tests"):
            bad.append(f"{module} imports {name}, which stands above the package")
        elif top == "mdmtrain" and theirs not in {*FLOORS, mine, "__version__"}:
            bad.append(f"{module} imports {name}, which is on no floor")
        elif theirs != mine and top == "mdmtrain" and theirs in FLOORS:
            down = FLOORS[theirs] < FLOORS[mine]
            if not down and (mine, theirs) not in ARROWS:
                bad.append(f"{module} imports {name}, which is not below it")
        if mine == "diffusion" and (top not in DIFFUSION_MAY_IMPORT or name.startswith("torch.distributed")):
            bad.append(f"{module} imports {name}: diffusion/ knows torch, numpy, scipy, and no rank")
    return bad


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_imports_go_down():
    found = [
        bad
        for name, path in modules().items()
        if unit(name) != "__init__"
        for bad in violations(name, path.read_text())
    ]
    assert not found, "\n".join(found)


def test_every_module_is_on_a_floor():
    units = {unit(name) for name in modules()}
    assert units - {"__init__"} == set(FLOORS)


def test_the_package_itself_imports_nothing():
    assert imports((PACKAGE / "__init__.py").read_text(), "mdmtrain") == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mdmtrain.config", "from mdmtrain.model.presets import PRESETS"),
        ("mdmtrain.model.head", "def late():\n    import mdmtrain.parallel.world"),
        ("mdmtrain.model.head", "from mdmtrain.data import shards"),
        ("mdmtrain.optim", "from ..optim2 import x\nfrom .monitor import metrics"),
        ("mdmtrain.parallel.world", "from mdmtrain.monitor.logs import log"),
        ("mdmtrain.parallel.world", "from mdmtrain.checkpoint import store"),
        ("mdmtrain.monitor.logs", "from mdmtrain.checkpoint import store"),
        ("mdmtrain.evaluate", "from mdmtrain.train import train"),
        ("mdmtrain.evaluate", "from mdmtrain import generate"),
        ("mdmtrain.likelihood", "from mdmtrain.evaluate import Evaluation"),
        ("mdmtrain.generate", "import mdmtrain.train"),
        ("mdmtrain.data.loader", "from mdmtrain.nowhere import x"),
        ("mdmtrain.train", "from launchers import slurm"),
        ("mdmtrain.train", "import tools.prepare_data"),
        ("mdmtrain.diffusion.strata", "import torch.distributed as dist"),
        ("mdmtrain.diffusion.strata", "from torch import distributed"),
        ("mdmtrain.diffusion.strata", "from torch.distributed.tensor import DTensor"),
        ("mdmtrain.diffusion.strata", "import pydantic"),
        ("mdmtrain.diffusion.strata", "from ..model import presets"),
    ],
)
def test_the_checker_sees_an_import_that_goes_up(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "mdmtrain.train",
            "from mdmtrain.evaluate import evaluate_split\nfrom mdmtrain import config as configuration",
        ),
        ("mdmtrain.train", "from mdmtrain import __version__\nimport rich"),
        (
            "mdmtrain.monitor.logs",
            "from mdmtrain.parallel.world import describe_error\nfrom .metrics import MetricsLog",
        ),
        (
            "mdmtrain.diffusion.strata",
            "import hashlib\nimport scipy.special\nfrom mdmtrain.config import DiffusionConfig",
        ),
    ],
)
def test_the_checker_lets_an_import_down_pass(module, source):
    assert violations(module, source) == []


def test_generate_does_not_import_evaluate():
    """Below it, yet neither needs the other."""
    assert "evaluate" not in {
        unit(name) for name in imports((PACKAGE / "generate.py").read_text(), "mdmtrain.generate")
    }
