"""Every command has a --help that works, and every command that README.md and docs/ quote is one that exists.

A quoted command is held against that help: its options must be there, and the files, the configuration keys and the
make targets that the pages name must exist. Its configuration files and settings must be valid together. All helps
come from one process: starting Python with torch takes seconds.
"""

import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from functools import cache
from importlib.util import find_spec
from unittest.mock import patch

import pytest

from launchers.sweep import all_runs, all_variations
from mdmtrain import config as configuration
from mdmtrain import config_help
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Started inside a job and not by a person: their one argument is the run that the launcher has prepared.
INSIDE_JOBS = {"launchers.rank", "launchers.supervise", "launchers.prepare_task"}
COMMAND = re.compile(r"(?:-m )?((?<=-m )(?:mdmtrain|launchers|tests)\.[\w.]+|tools/[\w/]+\.py)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SETTING = re.compile(r"[a-z0-9]+\.[a-z0-9_]+=.+")
SEVERAL = ("--arms", "--variant", "--vary", "--reference")  # of a sweep: their values are not settings of all its runs
REPOSITORY_FILE = re.compile(r"(?<![\w/.-])(?:mdmtrain|launchers|tools|configs|tests|docs)/[\w/.-]+\.(?:py|yaml|md)\b")


def commands() -> list[str]:
    """Every file that runs as a command, by the name that people type: a module, or tools/NAME.py."""
    names = []
    for folder in ("mdmtrain", "launchers", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if '\nif __name__ == "__main__":\n' in path.read_text():
                inside = path.relative_to(ROOT)
                names.append(str(inside) if folder == "tools" else ".".join(inside.with_suffix("").parts))
    return [name for name in names if name not in INSIDE_JOBS]


@cache
def help_of(name: str) -> str:
    """What NAME --help prints. Raises AssertionError unless the command ends with status 0 after it."""
    output = io.StringIO()
    path = [str((ROOT / name).parent), *sys.path]  # of a script; a module is found without it
    with (
        patch.object(sys, "argv", [name, "--help"]), patch.object(sys, "path", path), warnings.catch_warnings(),
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(output),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # runpy's, about a module that is imported already
        try:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"{name} --help ends with status {ended.code}: {output.getvalue()}"
    return output.getvalue()


def code_in(page: str) -> list[str]:
    """The lines of the code blocks of a page (continued lines joined), and its inline code."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4}.*(?:\n {4}.*)*", prose, re.MULTILINE)
    prose = re.sub(r"^ {4}.*\n", "\n", prose, flags=re.MULTILINE)
    lines = [line.strip() for block in fenced + indented for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def quoted(line: str) -> list[tuple[str, list[str]]]:
    """The commands in a line of code, each with its options."""
    line = re.sub(r"'[^']*'|\"[^\"]*\"", "''", line.split(" #")[0])
    found = list(COMMAND.finditer(line))
    ends = [match.start() for match in found[1:]] + [len(line)]
    return [(m[1], OPTION.findall(line[m.end() : end])) for m, end in zip(found, ends, strict=False)]


def refused(line: str) -> list[str]:
    """What is wrong with the configuration files and the settings of a command, taken together.

    All runs of a sweep are checked.
    """
    try:
        words = shlex.split(re.sub(r"(--[a-z-]+)=", r"\1 ", line.split(" #")[0]))
    except ValueError:  # not a command
        return []
    files = [str(ROOT / word) for word in words if REPOSITORY_FILE.fullmatch(word) and word.endswith(".yaml")]
    if not files or not COMMAND.search(line):
        return []
    pairs = list(zip(["", *words], words, strict=False))
    settings = [word for before, word in pairs if SETTING.fullmatch(word) and before not in SEVERAL]
    given = {option: [word for before, word in pairs if before == option] for option in SEVERAL}
    try:
        if given["--arms"] and "launchers.sweep" in line:
            variations = all_variations(given["--variant"], given["--vary"])
            all_runs(files + settings, given["--arms"][0].split(","), [0], variations, ROOT / "runs")
        else:
            configuration.load(files + settings)
    except ValueError as error:
        return [str(error)]
    return []


def problems(page: str) -> list[str]:
    """What a page names that does not exist."""
    bad, targets = [], set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    keys = {key.name for section in config_help.sections() for key in config_help.keys(section)}
    a_key = re.compile(rf"\b(?:{'|'.join(config_help.sections())})\.[a-z_]+")
    for line in code_in(page):
        for name, options in quoted(line):
            if name.startswith("tests."):
                continue  # run by the tests of their own
            if name not in commands():
                if options or not (ROOT / name).is_file():
                    bad.append(f"{name} is no command")
                continue
            if name == "tools/harness.py" and find_spec("lm_eval") is None:
                continue  # its options are lm_eval's
            known = set(OPTION.findall(help_of(name)))
            bad += [f"{name} has no {option}" for option in options if option not in known]
        bad += [
            f"make {target}: no such target"
            for target in re.findall(r"\bmake ([a-z][\w-]*)", line)
            if target not in targets
        ]
        assigned = [match[0] for match in a_key.finditer(line) if line[match.end() : match.end() + 1] == "="]
        bad += [f"{key} is no configuration key" for key in assigned if key not in keys]
        bad += refused(line)
        if a_key.fullmatch(line) and line not in keys and not line.endswith(".py"):
            bad.append(f"{line} is no configuration key")
    return bad + [f"{name} does not exist" for name in REPOSITORY_FILE.findall(page) if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", commands())
def test_help(name):
    shown = help_of(name)
    assert "usage" in shown.lower() or name == "tools/harness.py", shown
    assert len(shown.splitlines()) > 5


def test_these_are_commands():
    known = {"mdmtrain.train", "mdmtrain.evaluate", "mdmtrain.generate", "mdmtrain.config_help", "launchers.slurm"}
    known |= {"launchers.local", "launchers.status", "launchers.sweep", "tools/prepare_data.py", "tools/harness.py"}
    assert known <= set(commands())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_quotes_exists(path):
    assert not problems(path.read_text())


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("    python -m mdmtrain.trian x.yaml", "mdmtrain.trian is no command"),
        ("    torchrun --standalone -m mdmtrain.train c.yaml \\\n        --resume", "mdmtrain.train has no --resume"),
        ("say\n`tools/plan_run.py CONFIG\n--gpu h100 --gpuz 64`", "tools/plan_run.py has no --gpuz"),
        ("```bash\ntools/convert.py RUN --to llama\n```", "tools/convert.py is no command"),
        ("set `optim.learning_rate`", "optim.learning_rate is no configuration key"),
        ("    python -m mdmtrain.train c.yaml run.step=3", "run.step is no configuration key"),
        (
            "    python -m mdmtrain.train configs/quickstart.yaml optim.name=adamw",
            f"configuration {ROOT}/configs/quickstart.yaml: 'optim': muon_lr=0.005 needs name=muon: set both, or leave "
            "muon_lr out",
        ),
        (
            "    python -m launchers.sweep configs/study.yaml --arms standard,bset --dir DIR",
            f"--arms: unknown arm 'bset': choose from {', '.join(sorted(p.stem for p in ROOT.glob('configs/arms/*')))}",
        ),
        (
            "    python -m launchers.sweep configs/study.yaml --arms best --vary optim.lr=1e-3,a --dir DIR",
            f"configuration {ROOT}/configs/study.yaml + {ROOT}/configs/arms/best.yaml: 'optim.lr': input should be a "
            'valid number, got "a"',
        ),
        ("`make quikstart`", "make quikstart: no such target"),
        ("see mdmtrain/parallel/wrap.py", "mdmtrain/parallel/wrap.py does not exist"),
    ],
)
def test_a_page_that_is_wrong_is_found(page, problem):
    assert problem in problems(page)


def test_what_is_right_is_let_pass():
    page = "    torchrun --nproc-per-node 2 -m mdmtrain.train c.yaml run.steps=3   # --nonsense\n"
    page += (
        "`make test`, `data.sources`, `launchers.slurm --sbatch '--nonsense'`, `tools/plan_run.py`, docs/DESIGN.md\n"
    )
    assert not problems(page)
