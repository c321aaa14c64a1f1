"""What launchers.slurm and launchers.local share: the command line, the checks before a start, and RUN/job.

RUN/job holds a copy of the code, the resolved configuration and the options of the launch, so that later edits do not
change a queued job. The next launch into the same run folder replaces it.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.handle import run_job
from launchers.lifecycle import State, job_folder, newest_step, read_state, write_state
from mdmtrain import config as configuration
from mdmtrain.checkpoint.resume import find_resume, run_identity
from mdmtrain.checkpoint.run_folder import git_revision
from mdmtrain.checkpoint.run_lock import lock_holder
from mdmtrain.checkpoint.store import home, write_atomically
from mdmtrain.command import CommandParser
from mdmtrain.config import Config, RunPlan, resolve
from mdmtrain.data.checks import describe_cache, describe_mixture
from mdmtrain.data.loader import check_splits, mixture, open_splits, windows
from mdmtrain.data.order import START
from mdmtrain.files import writing
from mdmtrain.model.presets import ModelShape, describe_shape, model_shape

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Launch:
    """A run that may start: all checks that need no cluster have passed."""

    run_dir: Path  # absolute
    config: Config
    options: argparse.Namespace
    plan: RunPlan
    shape: ModelShape
    explanation: tuple[str, ...]  # lines that describe the resolved plan

    @property
    def log(self) -> Path:
        return self.run_dir / "logs"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def parser(name: str, description: str) -> CommandParser:
    made = CommandParser(prog=f"python -m launchers.{name}", description=description)
    made.add_argument(
        "config", nargs="*", metavar="CONFIG | section.key=value", help="configuration, as for mdmtrain.train"
    )
    made.add_argument("--nodes", type=positive, default=1, metavar="N", help="number of nodes (default: 1)")
    made.add_argument(
        "--gpus-per-node",
        type=count,
        default=0,
        metavar="M",
        help="GPUs of a node (default: 0, train on the CPU with gloo)",
    )
    made.add_argument(
        "--ranks-per-node", type=positive, metavar="R", help="ranks of a node (default: one per GPU, or 1 without GPUs)"
    )
    made.add_argument(
        "--max-crashes",
        type=positive,
        default=3,
        metavar="N",
        help="the run fails after N crashes in a row without a new checkpoint (default: 3)",
    )
    made.add_argument("--dry-run", action="store_true", help="check the inputs and print the plan, start nothing")
    return made


def parse(made: CommandParser, arguments: Sequence[str], defaults: dict | None) -> argparse.Namespace:
    """The options of a launch. `defaults`: the options of an earlier launch, which `arguments` override."""
    if defaults is not None:
        same = {**defaults, "config": None, "dry_run": False}
        if any(word.startswith(("--ranks-per-node", "--gpus-per-node")) for word in arguments):
            same["ranks_per_node"] = None  # derived again from the number of GPUs, unless it is given
        made.set_defaults(**same)
    options = made.parse_intermixed_args(list(arguments))
    options.ranks_per_node = options.ranks_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and options.ranks_per_node > options.gpus_per_node:
        raise ValueError(f"--ranks-per-node {options.ranks_per_node} with --gpus-per-node {options.gpus_per_node}: "
                         "each rank needs its own GPU; start fewer ranks")  # fmt: skip
    return options


def prepare(options: argparse.Namespace) -> Launch:
    """Validate the configuration, the data and the run folder before any rank starts. Raises ValueError."""
    config = configuration.load(options.config)
    world = options.nodes * options.ranks_per_node
    plan = resolve(config, world)
    run_dir = Path(config.run.dir).absolute()
    refuse_if_in_use(run_dir)
    if config.checkpoint.dir is not None:
        raise ValueError(
            f"checkpoint.dir={config.checkpoint.dir}: the launchers need the checkpoints in the run folder: "
            "leave this key out, or start the run with torchrun"
        )
    sources, validation = splits = open_splits(config.data, ("train", "validation"))
    check_splits(splits, ("size", "size"))
    order = mixture(config, sources)
    for split in validation:
        windows(split, config.data.sequence_length)
    describe_cache(config, sources, validation)
    tokenizer = sources[0].tokenizer()
    shape = model_shape(config.model, tokenizer.vocab_size)
    identity = run_identity(config, shape, tokenizer, [source.fingerprint for source in sources])
    find_resume(config, home(config), identity)
    step = newest_step(run_dir)
    if step >= config.run.steps:
        raise ValueError(f"{run_dir} is complete: {step} of {config.run.steps} steps; raise run.steps to train longer")
    if not step:  # later, an order may have begun anew
        describe_mixture(config, sources, order, START)
    start = f"from step {step}" if step else "from the beginning"
    ranks = f"ranks {world} = {options.nodes} nodes x {options.ranks_per_node}, {start}"
    return Launch(
        run_dir, config, options, plan, shape, (f"run folder {run_dir}", describe_shape(shape), ranks, *plan.reasons)
    )


def live_job(run_dir: Path) -> tuple[str, str] | None:
    """Id and Slurm state of the queued or running job of a run folder, or None. Raises ValueError as run_job does."""
    job = run_job(run_dir)
    if job is None:
        return None
    now = job.now()
    return (job.job_id, now.name) if now.lives else None


def refuse_if_in_use(run_dir: Path) -> None:
    """Raise ValueError if a job for this folder is queued or running, or if a process holds its lock (see RunLock)."""
    if live := live_job(run_dir):
        raise ValueError(f"run folder {run_dir} is in use by job {live[0]} ({live[1]}): cancel it with "
                         f"python -m launchers.status cancel {run_dir}, or choose another run.dir")  # fmt: skip
    holder = lock_holder(run_dir)
    if holder is not None:
        raise ValueError(f"run folder {run_dir} is in use by {holder}: stop that run, or choose another run.dir")


def write(launch: Launch, kind: str) -> State:
    """Write RUN/job and make RUN/logs. Returns the initial state. Raises OSError if a file cannot be written."""
    folder = job_folder(launch.run_dir)
    with writing(launch.log):
        launch.log.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=launch.log):  # a folder that cannot be written is an error now
            pass
    before = read_state(launch.run_dir)
    with writing(folder):
        folder.mkdir(exist_ok=True)
        copy_code(folder / "code")
    write_atomically(folder / "config.yaml", launch.config.to_yaml())
    record = {"options": vars(launch.options), "steps": launch.config.run.steps, "revision": git_revision(),
            "directory": os.getcwd(), "kind": kind}  # fmt: skip
    write_atomically(folder / "launch.json", json.dumps(record, indent=1) + "\n")
    state = State(kind, starts=before.starts if before else 0)  # a new launch counts crashes from 0
    write_state(launch.run_dir, state)
    return state


def copy_code(folder: Path) -> None:
    """Copy the code for a job, so that later edits do not change what runs. Replaces an older copy."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in ("mdmtrain", "launchers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def environment(threads: int) -> dict[str, str]:
    """Environment variables of the ranks. Variables that are set already keep their values."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # writes a trace that shows which collective hung
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
