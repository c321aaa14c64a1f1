"""Run on a Slurm cluster: one command submits a job that stops, saves, requeues and resumes by itself.

    python -m launchers.slurm configs/8b.yaml --nodes 16 --gpus-per-node 8 --time 1-0 [key=value ...]

The job stops and saves before its time limit and on preemption, and is requeued until the run is finished; after a
crash it starts again, without the node that crashed if enough others are left. submitit submits it: `executor` is
submitit's with our parameters, `supervise` (supervise.py) is the callable. `--dry-run` prints the job script.
docs/cluster.md is the user's guide, with a submitit script of one's own.
"""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers import launch as launch_module
from launchers import slurm_client
from launchers.launch import Launch, environment, parse, parser, positive, write
from launchers.lifecycle import job_folder, write_state
from launchers.supervise import supervise
from mdmtrain.checkpoint.run_folder import git_revision
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.cost import GIB, GPUS, Assumptions, cost
from mdmtrain.files import writing

OURS = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "mem", "partition", "account", "qos", "constraint",
        "time", "exclude", "clusters", "signal", "output", "error", "open-mode", "requeue", "no-requeue", "hold",
        "chdir", "job-name", "array")  # fmt: skip
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")  # any of them replaces our --gres
# Users set these for all their jobs. Here they are defaults of options, so that they are checked and shown.
DEFAULTS = {
    "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "qos": "SBATCH_QOS", "mem": "SBATCH_MEM_PER_NODE",
    "constraint": "SBATCH_CONSTRAINT", "time": "SBATCH_TIMELIMIT", "clusters": "SBATCH_CLUSTERS",
}  # fmt: skip
PYTHON = f"exec {shlex.quote(sys.executable)}"  # exec: Slurm must see how the supervisor ends, not how a shell does


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
    made.add_argument("--clusters", metavar="NAME", help="submit to another cluster of the same federation")
    made.add_argument("--gpu", choices=sorted(GPUS), help="say what the run needs on this kind of GPU")
    made.set_defaults(**{name: os.environ.get(variable) for name, variable in DEFAULTS.items()})
    return made


def prepare(options: argparse.Namespace) -> Launch:
    """As launch.prepare, with a core for each process of a rank unless --cpus says otherwise."""
    if options.clusters and "," in options.clusters:
        raise ValueError(f"--clusters {options.clusters}: name one cluster: a run is followed on one")
    launch = launch_module.prepare(options)
    options.cpus = options.cpus or 1 + launch.config.data.workers
    return launch


def read_launch(arguments: Sequence[str]) -> Launch:
    """A launch from the words of the command line, checked, for a submitit script of one's own. Raises ValueError."""
    return prepare(parse(slurm_parser(), arguments, None))


# ---- submitit


class RunExecutor(submitit.SlurmExecutor):
    """submitit's, for jobs of one task: the supervisor in the batch step, which starts the ranks itself.

    Of submitit's private members it uses _make_submission_file_text, _submitit_command_str and the parameter map_count.
    """

    @classmethod
    def affinity(cls) -> int:
        return 2  # the script can be printed where there is no Slurm

    def script(self, tasks: int) -> str:
        """What sbatch gets for one run, or for an array of several."""
        self.parameters["map_count"] = tasks if tasks > 1 else None
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            del self.parameters["map_count"]


def job_parameters(launches: Sequence[Launch], folder: Path | None = None, at_once: int | None = None) -> dict:
    """submitit's parameters for one run, or for an array of runs that differ in their configuration alone.

    folder: holds the logs, RUN if it is left out; at_once: tasks of the array that may run at the same time. An
    executor that takes these must be made with python=PYTHON. Raises ValueError for what sbatch could not read.
    """
    o, config, runs = launches[0].options, launches[0].config, [str(one.run_dir) for one in launches]
    folder = folder or launches[0].run_dir
    # submitit waits for a result of each task that it knows of: it must not know of the ranks.
    log = f"{folder}/logs/job-".replace("%", "%%") + ("%A_%a.log" if len(runs) > 1 else "%j.log")
    extra = {"nodes": o.nodes, "ntasks_per_node": o.ranks_per_node, "requeue": True, "output": log}
    if o.clusters:
        extra["clusters"] = o.clusters
    for word in o.sbatch:
        key, equals, value = word.lstrip("-").partition("=")
        if key in OURS:
            raise ValueError(f"--sbatch {word}: launchers.slurm sets {key} itself; see --help for the option")
        extra[key] = value if equals else True
    if o.gpus_per_node and not set(extra) & set(GPU_OPTIONS):
        extra["gres"] = f"gpu:{o.gpus_per_node}"
    named = {name: getattr(o, name) for name in ("mem", "partition", "account", "qos", "constraint", "exclude", "time")}
    refuse_what_sbatch_cannot_read([*runs, str(folder)], {**named, **extra})
    return {
        "job_name": folder.name,
        "cpus_per_task": o.cpus,
        **named,
        "signal_delay_s": o.stop_before,
        "array_parallelism": at_once or len(runs),
        "stderr_to_stdout": True,
        "use_srun": False,  # or srun would start a supervisor for each rank
        "wckey": None,
        "setup": setup_lines(o, runs, max(1, o.cpus - config.data.workers)),
        "additional_parameters": extra,
    }


def refuse_what_sbatch_cannot_read(folders: list[str], options: dict) -> None:
    for folder in folders:
        if bad := next((mark for mark in ("%j", "%t", "%A", "%a", "\\", "\n", "\r") if mark in folder), None):
            raise ValueError(
                f"run.dir={folder!r}: sbatch and submitit replace {bad!r} in a path: choose another run.dir"
            )
    for key, value in options.items():
        if isinstance(value, str) and any(character in value for character in "\\\n\r"):
            raise ValueError(f"--{key}: {value!r}: sbatch cannot read backslashes and line ends: choose another value")


def setup_lines(options: argparse.Namespace, runs: list[str], threads: int) -> list[str]:
    """The shell lines before the supervisor's command."""
    needed = shlex.join([sys.executable, os.getcwd()])
    return [
        "trap '' USR1 USR2 HUP  # until the supervisor has its own handlers",
        *options.setup,
        f"runs=({shlex.join(runs)})",
        'run="${runs[${SLURM_ARRAY_TASK_ID:-0}]}"',
        f'for path in "$run/job/code" {needed}; do',
        '  [ -e "$path" ] && continue',
        '  echo "error: $SLURMD_NODENAME does not see $path: it must lie on a file system that all nodes share"',
        "  exit 2",
        "done",
        *(f"export {name}=${{{name}:-{value}}}" for name, value in environment(threads).items()),
        "export PYTHONUNBUFFERED=1 SUBMITIT_LOG_LEVEL=WARNING",
        "export SUBMITIT_PREEMPT_SIGNAL=URG  # keeps submitit's own requeueing away from USR2",
        f"export MDMTRAIN_REVISION={shlex.quote(git_revision() or '')}",
        'cd "$run/job/code"  # python -m imports from here: edits do not change a queued job',
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
    ]


def executor(launches: Sequence[Launch], folder: Path, at_once: int | None = None) -> RunExecutor:
    """For one run, or for an array. folder: of the run, or of the sweep. The job is held until `submit` releases it."""
    parameters = job_parameters(launches, folder, at_once)
    parameters["additional_parameters"]["hold"] = True
    made = RunExecutor(job_folder(folder) / "submitit", python=PYTHON)
    made.update_parameters(**parameters)
    return made


# ---- refusals


def refuse_what_the_cluster_lacks(options: argparse.Namespace, tasks: int) -> None:
    """Raise ValueError where no nodes of the partition can hold the job, or not for so long."""
    cluster = options.clusters or ""
    if tasks > 1 and tasks > (most := slurm_client.most_array_tasks(cluster)):
        raise ValueError(f"{tasks} runs: this cluster allows {most} tasks in a job array (MaxArraySize): "
                         "start the sweep in parts, by --arms or --seeds")  # fmt: skip
    name = options.partition or next((one[:-1] for one in slurm_client.partitions(cluster) if one.endswith("*")), None)
    if name is None:
        return  # no default: Slurm itself says whether it chooses one for this job
    partition = slurm_client.partition(name, cluster)
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
                         "ask for less: the run resumes in another start")  # fmt: skip
    if limit <= options.stop_before + 60:
        raise ValueError(f"--stop-before {options.stop_before}: no time is left of a limit of {limit:.0f} s (Slurm may "
                         "signal 60 s early); lower it, or raise --time")  # fmt: skip


def refuse_what_slurm_refuses(script: str, cluster: str) -> None:
    """Raise ValueError with Slurm's own words."""
    try:
        slurm_client.slurm("sbatch", "--test-only", stdin=script, cluster=cluster)
    except ValueError as error:
        hint = "see sinfo and --help"
        if "partition" in str(error):
            hint = f"choose one with --partition: {', '.join(slurm_client.partitions(cluster))}"
        raise ValueError(f"Slurm would refuse this job: {error}: {hint}") from None


@contextmanager
def no_files_if_refused(folder: Path) -> Iterator[None]:
    """Raise ValueError, and remove what submitit has written to its folder, where sbatch refuses the job."""
    before = set(folder.glob("*"))
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints there what it raises, too
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        for path in set(folder.glob("*")) - before:
            path.unlink()
        raise ValueError(f"sbatch: {'; '.join(str(error).splitlines())}") from None


def submit(launches: list[Launch], folder: Path, at_once: int | None = None) -> list[str]:
    """Submit runs that differ in their configuration alone: one as a job, several as an array. Returns their job ids.

    folder: of the run, or of the sweep. Raises ValueError before anything is written where Slurm would refuse them.
    """
    made, options = executor(launches, folder, at_once), launches[0].options
    cluster = options.clusters or ""
    refuse_what_the_cluster_lacks(options, len(launches))
    refuse_what_slurm_refuses(made.script(len(launches)), cluster)
    if left_out := sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in DEFAULTS.values()):
        print(f"not passed on: {', '.join(left_out)}: use --sbatch for what they say")
    states = [write(one, "slurm") for one in launches]
    with writing(made.folder):
        for needed in (made.folder, folder / "logs"):
            needed.mkdir(parents=True, exist_ok=True)
    with slurm_client.outside_allocations(), no_files_if_refused(made.folder):
        jobs = [job.job_id for job in made.map_array(supervise, [one.run_dir for one in launches])]
    # Held until its number is written down, so that each run finds it when it begins.
    number = jobs[0].partition("_")[0]
    for one, state, job in zip(launches, states, jobs, strict=True):
        log = str(folder / f"logs/job-{job}.log")
        write_state(one.run_dir, replace(state, job=job, log=log, cluster=cluster, submitit=str(made.folder)))
    slurm_client.slurm("scontrol", "release", number, cluster=cluster)
    now = slurm_client.job_state(jobs[0], cluster)
    print(f"submitted job {number}, {now.name.lower()}")
    if not now.requeue:
        print("note: this cluster does not requeue the job: the run stops and saves before its time limit and on "
              "preemption; then resume it with launchers.status resume")  # fmt: skip
    print(f"  python -m launchers.status {folder.parent if len(launches) == 1 else folder} --watch")
    print(f"  tail -F {folder}/logs/job-{jobs[0]}.log")
    print(f"  python -m launchers.status cancel {' '.join(str(one.run_dir) for one in launches)}")
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
        print(f"\n{executor([one], one.run_dir).script(1)}\nnothing submitted (--dry-run)")
    else:
        submit([one], one.run_dir)


if __name__ == "__main__":
    with user_errors():
        launch(sys.argv[1:])
