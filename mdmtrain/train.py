"""Pretrain a masked diffusion language model.

    torchrun --standalone --nproc-per-node 2 -m mdmtrain.train CONFIG... [section.key=value ...]
    python -m mdmtrain.train CONFIG... [section.key=value ...]            one process

`take_steps` is the training loop. To change what a step does, change it there. `open_inputs` opens the data, and
`build_state` builds or loads the model, the optimizer and the rest of the training state.
"""

import gc
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchdata.stateful_dataloader import StatefulDataLoader

from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.export import SideExports
from mdmtrain.checkpoint.initial_weights import load_initial_weights
from mdmtrain.checkpoint.resume import (
    changes,
    choose_checkpoint,
    continued,
    describe_resume,
    leave_behind,
    run_identity,
)
from mdmtrain.checkpoint.run_folder import record_start, removed_if_refused
from mdmtrain.checkpoint.run_lock import RunLock
from mdmtrain.checkpoint.saver import Saver
from mdmtrain.checkpoint.writer import CheckpointWriter
from mdmtrain.command import CommandParser, survive_terminal, user_errors
from mdmtrain.config import Config, RunPlan, resolve
from mdmtrain.config_help import HelpAction
from mdmtrain.cost import mfu_per_speed
from mdmtrain.data.checks import describe_data, shared_documents
from mdmtrain.data.loader import check_splits, loader_errors, open_splits, train_loader, validation_rows
from mdmtrain.data.order import START, Cursor
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion.objective import ForwardProcess, row_losses, row_statistics
from mdmtrain.diffusion.sampler import RateSampler, token_table
from mdmtrain.due import Due, due_after
from mdmtrain.evaluate import evaluate_split, split_names
from mdmtrain.model.presets import ModelShape, describe_shape, model_shape
from mdmtrain.model.transformer import Transformer, masked_cross_entropy
from mdmtrain.monitor.display import check_displays
from mdmtrain.monitor.logs import log, log_to_file, say
from mdmtrain.monitor.metrics import COMPONENTS, DENSITY, disk_use, evaluated, validation_scores
from mdmtrain.monitor.profile import Profiler, out_of_memory
from mdmtrain.monitor.recorder import StepRecorder
from mdmtrain.monitor.run_log import RunLog
from mdmtrain.optim import EMA, Optimizer, build_optimizer, learning_rate, optimizer_step
from mdmtrain.parallel.parallelize import GraphCount, build_model, data_mesh, init_weights
from mdmtrain.parallel.stop import Interrupted, reason
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World, init_world, set_timeout, use_deterministic_algorithms
from mdmtrain.variance.pair import GradientPair
from mdmtrain.variance.probe import Probe

LATE = 5.0  # minutes by which torch's timeouts are longer than the watchdog's: they end a run if the watchdog cannot
GARBAGE_EVERY = 50  # steps between collections of young garbage; old garbage is collected after a save


# ---- inputs, state and outputs of a run


@dataclass(frozen=True)
class Inputs:
    """What a run reads. All of it is validated."""

    plan: RunPlan
    lock: RunLock | None  # only on rank 0; the run folder is locked as long as this object exists
    sources: list[PreparedSplit]
    validation: list[PreparedSplit]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Outputs:
    """The outputs of a run."""

    log: RunLog
    saver: Saver


@dataclass
class State:
    """The state of a run between two steps: what a checkpoint saves, and where it was loaded from."""

    shape: ModelShape
    model: Transformer
    optimizer: Optimizer
    average: EMA | None
    sampler: RateSampler
    recorder: StepRecorder
    step: int  # number of steps done
    cursor: Cursor
    identity: dict  # see run_identity
    home: Path  # the folder of the checkpoints
    resumed: Path | None  # the checkpoint that the run was resumed from
    origin: str  # where the weights come from, as text for the terminal
    evaluation_pending: bool  # the evaluation after `step` is still to be done, because the run was stopped before it


@dataclass(frozen=True)
class Run:
    """What the training loop works with."""

    config: Config
    world: World
    watch: Watchdog
    inputs: Inputs
    state: State
    outputs: Outputs
    loader: StatefulDataLoader
    probe: Probe
    graphs: GraphCount


def open_inputs(config: Config, world: World, watch: Watchdog) -> Inputs:
    """Lock the run folder, then open and validate what the run reads. A collective. Raises AgreedError."""
    run_dir = Path(config.run.dir)
    plan = world.agree(lambda: resolve(config, world.size))
    world.agree(lambda: check_displays(config), main_only=True)
    lock = world.agree(lambda: RunLock(run_dir) if world.is_main else None)
    world.agree(lambda: log_to_file(run_dir / "logs", world.rank))
    splits = world.agree(lambda: open_splits(config.data, ("train", "validation")), main_only=True)
    world.agree(lambda: check_splits(splits, (config.data.verify, "size"), (world.rank, world.size)))
    watch.at("preparation")  # that may have taken long, and so may what follows
    sources, validation = splits
    rows = config.eval.rows
    data = config.data
    # Refused now, not after hours.
    world.agree(
        lambda: [validation_rows(split, rows, data.sequence_length, data.document_mask) for split in validation]
    )
    tokenizer = world.agree(lambda: sources[0].tokenizer())
    return Inputs(plan, lock, sources, validation, tokenizer)


def build_state(inputs: Inputs, config: Config, world: World) -> State:
    """Build the model, the optimizer and the rest of the training state. A collective. Raises AgreedError.

    The values come from a checkpoint of this run. Without one, the weights are those of checkpoint.init_from, or are
    newly initialised.
    """
    tokenizer = inputs.tokenizer
    shape = world.agree(lambda: model_shape(config.model, tokenizer.vocab_size))
    model = build_model(shape, config.parallel, world)
    set_timeout(data_mesh(config.parallel, world), LATE + config.run.slow_timeout)
    optimizer = build_optimizer(model, config.optim)
    listed = config.diffusion.isad_tokens
    delimiters = world.agree(lambda: token_table(listed, tokenizer.pieces(), "diffusion.isad_tokens"))
    sampler = RateSampler(config.diffusion, world.device, delimiters)
    mfu = mfu_per_speed(shape, config, world.size, world.device)
    recorder = StepRecorder(config, inputs.plan, world.device, world.rank, mfu)
    step = 0
    cursor = START

    identity = run_identity(config, shape, tokenizer, [source.fingerprint for source in inputs.sources])
    home = world.agree(lambda: store.home(config))
    resumed = choose_checkpoint(config, home, identity, world)
    if resumed is None and config.checkpoint.init_from is None:
        init_weights(model, config.run.seed)
        origin = f"fresh weights from seed {config.run.seed}"
    elif resumed is None:
        origin = f"weights of {load_initial_weights(config, identity, tokenizer, model, world)}"
    average = EMA(model, config.optim.ema_decay) if config.optim.ema_decay is not None else None
    if resumed is not None:
        meta = world.agree(lambda: store.read_meta(resumed), main_only=True)
        store.load(resumed, meta, store.training_tensors(model, optimizer, average, sampler), world)
        store.spread_adam_step(optimizer)
        sampler.restored()
        step = meta["step"]
        cursor = continued(meta, identity)
        recorder.restore(meta["recorder"], cursor, same_batch=not changes(meta, identity))
        origin = describe_resume(resumed, meta, identity, config)
    evaluates = config.evaluates(step) and step <= config.run.steps
    evaluation_pending = world.agree(lambda: evaluates and not evaluated(Path(config.run.dir), step), main_only=True)
    return State(
        shape=shape,
        model=model,
        optimizer=optimizer,
        average=average,
        sampler=sampler,
        recorder=recorder,
        step=step,
        cursor=cursor,
        identity=identity,
        home=home,
        resumed=resumed,
        origin=origin,
        evaluation_pending=evaluation_pending,
    )


def open_outputs(state: State, inputs: Inputs, config: Config, world: World) -> Outputs:
    """Open what the run writes, and print the notes that precede the first step. A collective. Raises AgreedError."""
    run_dir = Path(config.run.dir)
    sources = inputs.sources
    validation = inputs.validation
    facts = world.agree(lambda: describe_data(config, sources, validation, state.cursor), main_only=True)
    moved = world.agree(lambda: leave_behind(config, state.home, state.step), main_only=True)
    world.agree(lambda: record_start(run_dir, config, state.step, state.origin, world.size), main_only=True)
    run_log = RunLog(config, state.step, world, bits_per_nat(inputs.validation))
    scores = validation_scores(run_dir) if world.is_main else {}
    patience = LATE + config.run.slow_timeout
    writer = CheckpointWriter(state.home, inputs.tokenizer.model, config.checkpoint, world, patience)
    saver = Saver(config, inputs.plan, writer, world, state.resumed, state.identity, state.cursor, scores)

    for line in world.agree(lambda: shared_documents(sources, validation), main_only=True):
        log.warning(line)  # on the terminal of rank 0
    notes = [f"run folder {run_dir}", state.origin, *moved, *run_log.notes, describe_shape(state.shape)]
    notes += facts
    notes += inputs.plan.reasons
    notes.append(disk_use(config))
    if config.parallel.offload and world.device.type == "cpu":
        notes.append("parallel.offload=true has no effect without a GPU: everything is in host memory already")
    for line in notes:
        say(world, line)
    return Outputs(run_log, saver)


# ---- the run


def train(config: Config, world: World, watch: Watchdog | None = None) -> None:
    """Start or resume the run in run.dir and train to its last step, or until it is stopped.

    A collective. Raises what `open_inputs`, `build_state` and `train_from` raise.
    """
    watch = watch or Watchdog(world, config.run)
    inputs = open_inputs(config, world, watch)
    state = build_state(inputs, config, world)
    train_from(state, inputs, config, world, watch)


def train_from(state: State, inputs: Inputs, config: Config, world: World, watch: Watchdog) -> None:
    """Train the remaining steps, and write all outputs of the run. A collective.

    Raises ValueError. Raises Interrupted if the run was stopped before the evaluation after the last step.
    """
    steps = config.run.steps
    if state.step >= steps and not state.evaluation_pending:
        SideExports(config, state.resumed, world.is_main).finish()  # an export that was interrupted earlier
        say(world, nothing_to_do(config.run.dir, state.step, steps))
        return
    loader = world.agree(
        lambda: train_loader(
            config,
            inputs.plan,
            world.rank,
            inputs.sources,
            first_step=state.step,
            pin_memory=world.device.type == "cuda",
            cursor=state.cursor,
            validation=inputs.validation,
        )
    )
    outputs = open_outputs(state, inputs, config, world)
    probe = Probe(state.model, config, inputs.tokenizer.mask_id, world)
    graphs = GraphCount(config.parallel.compile)
    stopped = take_steps(Run(config, world, watch, inputs, state, outputs, loader, probe, graphs))
    outputs.log.checkpoint(outputs.saver.finish())
    outputs.log.close()
    watch.stop.drain()
    watch.at("export")
    outputs.saver.finish_exports()
    if best := outputs.saver.best():
        say(world, best)
    if stopped:
        left = " before its evaluation" if config.evaluates(state.step) else ""
        what = f"stopped by {reason(stopped)} after step {state.step}{left}, checkpoint saved"
        say(world, f"{what}; run the same command again to resume")
    if stopped and state.step == steps:
        raise Interrupted(stopped)


def take_steps(run: Run) -> int:
    """The training loop: all remaining steps, with the evaluations, checkpoints and records that are due after them.

    Returns 0, or the number of the stop that ended the loop early (see AgreedStop.poll). A collective. Raises
    AgreedError.
    """
    config = run.config
    world = run.world
    watch = run.watch
    state = run.state
    plan = run.inputs.plan
    mask_id = run.inputs.tokenizer.mask_id
    model = state.model
    sampler = state.sampler
    recorder = state.recorder
    steps = config.run.steps
    pair = GradientPair(model)
    profiler = Profiler(config.monitor, Path(config.run.dir), world)
    if sampler.fits("once") and state.resumed is None:
        fit_rates(run)

    batches = iter(run.loader)
    stopped = evaluation(run) if state.evaluation_pending else 0
    model.train()
    recorder.resume_clock()
    run.outputs.log.start_clock()
    while state.step < steps and not stopped:
        profiler.before(state.step)
        if state.step % GARBAGE_EVERY == 0:
            gc.collect(1)
        watch.at("rates", state.step)
        process = sampler.process(state.step / steps)
        draws = process.draw(config.run.seed, state.step, config.slots_per_step, world.size)
        sums = recorder.new_sums()
        for micro_step in range(plan.accumulation):
            model.set_requires_all_reduce(micro_step == plan.accumulation - 1)  # HSDP: one all-reduce per step
            watch.at("data")
            batch = recorder.wait_for(batches)
            watch.at("masking")
            drawn = draws.at(batch.slots.numpy())
            masked_batch = process.corrupt(batch.ids, batch.eligible, batch.uniforms, drawn, mask_id).to(world.device)
            watch.at("forward")
            ce = masked_cross_entropy(model, masked_batch, batch.segments, plan.rows_per_slot)
            losses = row_losses(ce, masked_batch)
            watch.at("backward")
            (losses.sum() / plan.tokens_per_step).backward()  # divided by the global batch: FSDP sums over ranks
            watch.at("statistics")
            statistics = row_statistics(ce.detach(), masked_batch, config.diffusion.target)
            eligible = int(batch.eligible.sum()) * plan.rows_per_slot
            recorder.add_micro_step(sums, losses.detach(), statistics, process.row_cells(drawn), len(ce), eligible)
            recorder.add_sources(sums, losses.detach(), batch.samples[:, 0])
        if pair.half:
            recorder.add_pair(sums, pair.compare() / config.parallel.replicate)  # every replica adds the same value
        elif due_after(config, state.step + 2).probe and not due_after(config, state.step + 1).interrupts:
            pair.keep()  # the two steps of a pair must not have an evaluation or a checkpoint between them
        watch.at("sums")
        recorder.add_own(sums)
        world.sum(sums)
        watch.at("optimizer")
        lr = learning_rate(config.optim, state.step, steps)
        norm, skipped = optimizer_step(state.optimizer, sums.isfinite().all(), lr, config.optim.clip_norm)
        watch.at("records")
        if state.average is not None:
            state.average.update(model, state.optimizer.found_inf)  # on the device of the weights
        state.step += 1
        row_counts = np.bincount(process.row_cells(draws), minlength=config.diffusion.bins)
        sampler.add(recorder.statistics(sums), row_counts, skipped)
        recorder.add_step(state.step, process, draws, row_counts, sums, norm, skipped, lr)
        if sampler.due(state.step):
            sampler.use(world.agree(sampler.fitted, main_only=True))  # only rank 0 fits, so all ranks have equal bits

        stopped = watch.stop.poll()  # a stop discards the first half of a gradient pair
        due = due_after(config, state.step, reason(stopped))
        if due.log:
            stopped = log_steps(run, process, due) or stopped
        if due.evaluation and not stopped:
            stopped = evaluation(run)
        if due.save or stopped:
            save(run)
        if due.probe or due.interrupts:
            recorder.resume_clock()
            run.graphs.resume()
    profiler.close()
    return stopped


# ---- what follows a step


def log_steps(run: Run, process: ForwardProcess, due: Due) -> int:
    """Write the records of the steps since the last call, with a probe if it is due. A collective.

    The host waits for the device here; docs/DESIGN.md, law 5, lists the other places. Returns 0, or the number of a
    stop that was requested during the probe.
    """
    run_log = run.outputs.log
    step = run.state.step
    run.watch.at("log")
    log.debug("after step %d: %s", step, due)
    records = run.state.recorder.flush()
    run.graphs.report(step)
    stopped = measure_components(run, process, records[-1]) if due.probe else 0
    run_log.steps(records, run.state.recorder, run.loader.dataset, keep_last=due.interrupts)
    run_log.checkpoint(run.outputs.saver.poll())
    return stopped


def save(run: Run) -> None:
    """Begin an asynchronous checkpoint. A collective. It waits for the previous one, if that is not complete yet."""
    state = run.state
    run.watch.at("checkpoint")
    run.outputs.log.checkpoint(run.outputs.saver.finish())
    run.outputs.log.sync()
    tensors = store.training_tensors(state.model, state.optimizer, state.average, state.sampler)
    run.outputs.saver.save(state.step, tensors, state.recorder.state())
    gc.collect()


def measure_components(run: Run, process: ForwardProcess, record: dict) -> int:
    """Measure the variance components of the loss, and add them and the density to a step's record. A collective.

    Returns 0. If a stop is requested during the measurement, returns its number and adds nothing.
    """
    state = run.state
    run.watch.at("probe")
    try:
        components, seconds, share = run.probe.decompose(process, run.inputs.validation, state.step, run.watch)
    except Interrupted as interruption:
        return interruption.number
    record |= {COMPONENTS: components, DENSITY: state.sampler.picture()}
    run.outputs.log.probe_cost(state.step, seconds, share)
    return 0


def evaluation(run: Run) -> int:
    """Evaluate the weights (their EMA if optim.ema_decay is set) and record the result. A collective.

    Returns 0. If a stop is requested during the evaluation, returns its number and records nothing.
    """
    state = run.state
    data = run.config.data
    validation = run.inputs.validation
    names = split_names(validation, [source.path for source in data.sources])
    settings = (run.config.eval, data.sequence_length, data.document_mask, run.inputs.tokenizer.mask_id)
    model = state.model
    run.watch.at("evaluation")
    model.eval()
    try:
        with state.average.swapped_into(model) if state.average is not None else nullcontext():
            found = [
                evaluate_split(model, split, name, *settings, run.world, run.watch)
                for name, split in zip(names, validation, strict=True)
            ]
    except Interrupted as interruption:
        return interruption.number
    finally:
        model.train()
    run.outputs.log.evaluation(state.step, found)
    run.outputs.saver.scores[state.step] = float(np.mean([one.nelbo for one in found]))
    return 0


def fit_rates(run: Run) -> None:
    """Fit p(t) to the initial weights, before the first step. A collective."""
    world = run.world
    sampler = run.state.sampler
    fit = run.config.diffusion
    size = f"{fit.fit_rates} rates x {fit.fit_sequences} sequences x {fit.fit_masks} masks"
    say(world, f"fitting p(t) to {size}")
    fitted = run.probe.fit(sampler.process(0.0), run.inputs.sources)
    sampler.use(world.agree(lambda: fitted.p, main_only=True))  # equal bits on all ranks


def bits_per_nat(validation: list[PreparedSplit]) -> float:
    """The factor that converts nats per eligible token to bits per byte, for these validation splits."""
    tokens = sum(split.eligible_tokens for split in validation)
    return tokens / sum(split.bytes for split in validation) / math.log(2)


def nothing_to_do(run_dir: str, done: int, wanted: int) -> str:
    """The message for a run that has already done at least `wanted` steps."""
    if done > wanted:
        return (
            f"{run_dir} has done {done} steps, more than run.steps={wanted}: nothing to train; raise run.steps to "
            "continue, or go back to an older checkpoint with checkpoint.resume=STEP"
        )
    return f"{run_dir} is complete: {done} of {wanted} steps; raise run.steps to train more steps, or evaluate it"


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m mdmtrain.train",
        description="Pretrain a masked diffusion language model; run under torchrun for several ranks. "
        "The same command given again resumes the run from its newest checkpoint.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=HelpAction)
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG | section.key=value",
        help="YAML files (a later file overrides earlier ones), then single settings",
    )
    config = configuration.load(parser.parse_args(arguments).config)
    survive_terminal()  # everything printed is also in the run folder
    if config.run.deterministic:
        use_deterministic_algorithms()
    world = init_world(LATE + config.run.slow_timeout, Path(config.run.dir) / "logs")
    gc.freeze()  # objects that imports made are never garbage
    gc.disable()  # take_steps collects on all ranks at the same step, so no rank waits for another rank's collection
    folder = removed_if_refused(Path(config.run.dir)) if world.is_main else nullcontext()
    with folder, Watchdog(world, config.run) as watch, out_of_memory(config, world), loader_errors():
        train(config, world, watch)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
