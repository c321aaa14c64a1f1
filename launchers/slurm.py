"""Run on a Slurm cluster: one command submits a job that looks after itself.

    python -m launchers.slurm configs/8b.yaml --nodes 16 --gpus-per-node 8 --time 1-0 [key=value ...]

The job stops and saves before its time limit and on preemption, and has itself requeued until the run is finished;
after a crash it starts again, without the node that crashed where others are left. `--dry-run` prints the job script.
Plain sbatch and srun: RUN/job/job.sh is all there is, and can be submitted by hand.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launchers import launch as launch_module
from launchers import slurm_client
from launchers.launch import Launch, environment, parse, parser, positive, write
from launchers.lifecycle import job_folder, write_state
from mdmtrain.checkpoint.run_folder import git_revision
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.cost import GIB, GPUS, Assumptions, cost
from mdmtrain.monitor.logs import CommandParser, user_errors
from mdmtrain.parallel.world import writing

OURS = ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "partition", "account", "qos",
        "constraint", "time", "exclude", "signal", "output", "error", "open-mode", "requeue", "no-requeue", "chdir",
        "job-name", "array")  # fmt: skip


def slurm_parser() -> CommandParser:
    made = parser("slurm", __doc__.split("\n\n")[0])
    made.add_argument("--cpus", type=positive, metavar="N", help="cores for each rank (1 + data.workers)")
    made.add_argument("--mem", metavar="SIZE", help="memory of a node, such as 64G; the partition's default without it")
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        made.add_argument(f"--{name}", help=f"as sbatch --{name}")
    made.add_argument("--time", metavar="LIMIT", help="limit of one start, as sbatch --time; the run may take longer")
    made.add_argument(
        "--stop-before",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="before the time limit, to finish a step and save (300); Slurm may be a minute early",
    )
    made.add_argument("--setup", action="append", default=[], metavar="LINE",
                      help="shell line to run first: 'module load cuda', '. cluster.sh'; may export RANK_PREFIX, "
                      "which goes before the ranks' command: 'apptainer exec --nv image.sif'")  # fmt: skip
    made.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option")
    made.add_argument("--gpu", choices=sorted(GPUS), help="say what the run needs on this kind of GPU")
    return made


def prepare(options: argparse.Namespace) -> Launch:
    """As launch.prepare, with a core for each process of a rank unless --cpus says otherwise."""
    launch = launch_module.prepare(options)
    options.cpus = options.cpus or 1 + launch.config.data.workers
    return launch


def directives(launch: Launch) -> list[str]:
    """The options of sbatch, without their dashes."""
    o = launch.options
    listed = [f"nodes={o.nodes}", f"ntasks-per-node={o.ranks_per_node}", f"cpus-per-task={o.cpus}"]
    if o.gpus_per_node:
        listed.append(f"gpus-per-node={o.gpus_per_node}")
    for name in ("mem", "partition", "account", "qos", "constraint", "exclude", "time"):
        if getattr(o, name) is not None:
            listed.append(f"{name}={getattr(o, name)}")
    listed += [f"signal=USR2@{o.stop_before}", "requeue", f"chdir={os.getcwd()}", "open-mode=append"]
    for extra in o.sbatch:
        key = extra.partition("=")[0].lstrip("-")
        if key in OURS:
            raise ValueError(f"--sbatch {extra}: launchers.slurm sets {key} itself; see --help for the option")
        listed.append(extra.lstrip("-"))
    return listed


def job_script(launches: list[Launch], folder: Path, at_once: int | None) -> str:
    """A script that supervises one run, or as a task of an array one of several, at most `at_once` at a time."""
    launch, alone = launches[0], len(launches) == 1
    listed = [f"job-name={folder.name}", *directives(launch)]
    listed.append(f"output={str(folder / 'logs/job-').replace('%', '%%')}{'%j' if alone else '%A_%a'}.log")
    if not alone:
        listed.append(f"array=0-{len(launches) - 1}" + (f"%{at_once}" if at_once else ""))
    lines = ["#!/bin/bash"]
    for directive in listed:
        key, equals, value = directive.partition("=")
        if any(character in value for character in '"\n'):
            raise ValueError(f"--{key}: {value!r}: sbatch cannot read quotes and line ends: choose another value")
        lines.append(f'#SBATCH --{key}="{value}"' if equals else f"#SBATCH --{key}")
    lines += [*launch.options.setup, ""]
    threads = max(1, launch.options.cpus - launch.config.data.workers)
    lines += [f"export {name}=${{{name}:-{value}}}" for name, value in environment(threads).items()]
    lines += [
        "export PYTHONUNBUFFERED=1",
        f"export MDMTRAIN_REVISION={shlex.quote(git_revision() or '')}",
        f"runs=({shlex.join(str(one.run_dir) for one in launches)})",
        "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
        'export PYTHONPATH="$run/job/code"',
        f'exec {shlex.quote(sys.executable)} "$run/job/code/launchers/supervise.py" "$run"',
    ]
    return "\n".join(lines) + "\n"


# ---- refusals


def refuse_what_the_cluster_lacks(options: argparse.Namespace) -> None:
    """Raise ValueError where no nodes of the partition can hold the job, or not for so long."""
    partition = slurm_client.partition(options.partition)
    where = f"partition {partition.name}"
    banned = slurm_client.expand(options.exclude or "")
    left = [node for node in partition.nodes if node.name not in banned]
    if options.nodes > len(left):
        without = f" after --exclude {options.exclude}" if len(left) < len(partition.nodes) else ""
        raise ValueError(f"--nodes {options.nodes}: {where} has {len(left)} nodes{without}; ask for fewer")
    cores = options.ranks_per_node * options.cpus
    for option, asked, have in (
        (f"--gpus-per-node {options.gpus_per_node}", options.gpus_per_node, [node.gpus for node in left]),
        (f"--ranks-per-node {options.ranks_per_node} x --cpus {options.cpus}", cores, [node.cpus for node in left]),
    ):
        enough = sum(number >= asked for number in have)
        if enough < options.nodes:
            raise ValueError(f"{option}: {enough} of the {len(left)} nodes of {where} have that many "
                             f"(most: {max(have)}); ask for fewer")  # fmt: skip
    limit = partition.default if options.time is None else slurm_client.seconds(options.time)
    if limit > partition.limit:
        raise ValueError(f"--time {options.time}: longer than {where} allows ({partition.limit / 60:.0f} minutes); "
                         "ask for less: the run goes on in another start")  # fmt: skip
    if limit <= options.stop_before + 60:
        raise ValueError(f"--stop-before {options.stop_before}: no time is left of a limit of {limit:.0f} s (Slurm may "
                         "signal 60 s early); lower it, or raise --time")  # fmt: skip


def submit(launches: list[Launch], folder: Path, at_once: int | None = None) -> list[str]:
    """Submit runs that differ in their configuration alone: one as a job, several as an array. Returns their job ids.

    folder: of the run, or of the sweep. Raises ValueError before anything is written where Slurm would refuse them.
    """
    script = job_script(launches, folder, at_once)
    refuse_what_the_cluster_lacks(launches[0].options)
    try:
        slurm_client.slurm("sbatch", "--test-only", stdin=script)
    except ValueError as error:
        raise ValueError(f"Slurm would refuse this job: {error}: see sinfo and --help") from None
    states = [write(launch, "slurm") for launch in launches]
    path = job_folder(folder) / "job.sh"
    with writing(path):
        for needed in (path.parent, folder / "logs"):
            needed.mkdir(exist_ok=True)
    write_atomically(path, script)
    # Held until its number is written down, so that each run finds it when it begins.
    number = slurm_client.slurm("sbatch", "--parsable", "--hold", str(path)).strip().split(";")[0]
    jobs = [number] if len(launches) == 1 else [f"{number}_{task}" for task in range(len(launches))]
    for launch, state, job in zip(launches, states, jobs, strict=True):
        write_state(launch.run_dir, replace(state, job=job, log=str(folder / f"logs/job-{job}.log")))
    slurm_client.slurm("scontrol", "release", number)
    print(f"submitted job {number}, {slurm_client.job_state(jobs[0]).name.lower()}")
    print(f"  python -m launchers.status {folder.parent if len(launches) == 1 else folder} --watch")
    print(f"  tail -F {folder}/logs/job-{jobs[0]}.log")
    print(f"  python -m launchers.status cancel {' '.join(str(launch.run_dir) for launch in launches)}")
    return jobs


def planned(launch: Launch) -> list[str]:
    """What tools/plan_run.py says about this run on the kind of GPU that --gpu names."""
    gpu = launch.options.gpu
    one = cost(launch.config, launch.shape, launch.plan.world_size, GPUS[gpu], Assumptions())
    fits = "fits into" if one.fits else "DOES NOT FIT into"
    return [f"memory {one.memory_total / GIB:.1f} GiB a GPU: {fits} {GPUS[gpu].memory / GIB:.0f} GiB of {gpu}",
            f"step {one.step_seconds:.3g} s, {one.tokens_per_second:,.0f} tokens/s, {one.days:,.2f} days in all "
            "(data-sheet arithmetic: tools/plan_run.py)"]  # fmt: skip


def launch(arguments: Sequence[str], defaults: dict | None = None) -> None:
    """Submit as the command line says, on top of the options of an earlier launch. Raises ValueError."""
    options = parse(slurm_parser(), arguments, defaults)
    one = prepare(options)
    print(*one.explanation, *(planned(one) if options.gpu else ()), sep="\n")
    if options.dry_run:
        print(f"\n{job_script([one], one.run_dir, None)}\nnothing submitted (--dry-run)")
    else:
        submit([one], one.run_dir)


if __name__ == "__main__":
    with user_errors():
        launch(sys.argv[1:])
