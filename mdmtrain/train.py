"""Pretrain a masked diffusion language model.

    torchrun --standalone --nproc-per-node 2 -m mdmtrain.train CONFIG... [section.key=value ...]
    python -m mdmtrain.train CONFIG... [section.key=value ...]            one process

Read `take_steps` from top to bottom: that is the training loop. To change what a step does, change it there. What the
loop works on is opened in `open_inputs` and built, or loaded, in `build_state`.
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
from mdmtrain.checkpoint.run_folder import describe_run, removed_if_refused
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
from mdmtrain.diffusion.objective import row_losses, row_statistics
from mdmtrain.diffusion.sampler import RateSampler, token_table
from mdmtrain.due import due_after
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
from mdmtrain.parallel.world import World, init_world, set_timeout
from mdmtrain.variance.pair import GradientPair
from mdmtrain.variance.probe import Probe

LATE = 5.0  # minutes after the watchdog, in which torch's own timeouts end a run that even the watchdog could not
GARBAGE_EVERY = 50  # steps: when Python looks for young cycles, on all ranks together; for old ones, at a save


# ---- what a run reads, what it is made of, and where it writes


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked."""

    plan: RunPlan
    lock: RunLock | None  # on rank 0: the run folder is this run's until this goes
    sources: list[PreparedSplit]
    validation: list[PreparedSplit]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Outputs:
    """Where a run writes."""

    log: RunLog
    saver: Saver


@dataclass
class State:
    """A run between two steps: what a checkpoint keeps, and where it came from."""

    shape: ModelShape
    model: Transformer
    optimizer: Optimizer
    average: EMA | None
    sampler: RateSampler
    recorder: StepRecorder
    step: int  # iterations done
    cursor: Cursor
    identity: dict  # see run_identity
    home: Path  # where the checkpoints are
    resumed: Path | None  # the checkpoint that this start resumes from
    origin: str  # where the weights come from, for a person
    owes_evaluation: bool  # a stop came before the evaluation that was due after `step`


def open_inputs(config: Config, world: World, watch: Watchdog) -> Inputs:
    """Lock the run folder, and open and check what the run reads. A collective. Raises AgreedError."""
    run_dir = Path(config.run.dir)
    plan = world.agree(lambda: resolve(config, world.size))
    world.agree(lambda: check_displays(config), main_only=True)
    lock = world.agree(lambda: RunLock(run_dir) if world.is_main else None)
    world.agree(lambda: log_to_file(run_dir / "logs", world.rank))
    splits = world.agree(lambda: open_splits(config.data, ("train", "validation")), main_only=True)
    world.agree(lambda: check_splits(splits, (config.data.verify, "size"), (world.rank, world.size)))
    watch.at("preparation")  # that may have taken long, and so may what follows
    sources, validation = splits
    wanted = (config.eval.rows, config.data.sequence_length, config.data.document_mask)
    world.agree(lambda: [validation_rows(split, *wanted) for split in validation])  # refused now, not after hours
    tokenizer = world.agree(lambda: sources[0].tokenizer())
    return Inputs(plan, lock, sources, validation, tokenizer)


def build_state(inputs: Inputs, config: Config, world: World) -> State:
    """Build the model and all that trains it, and fill them: from a checkpoint of this run, from another run's weights,
    or with fresh weights. A collective. Raises AgreedError.
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
    owes = world.agree(lambda: evaluates and not evaluated(Path(config.run.dir), step), main_only=True)
    return State(
        shape, model, optimizer, average, sampler, recorder, step, cursor, identity, home, resumed, origin, owes
    )


def open_outputs(state: State, inputs: Inputs, config: Config, world: World) -> Outputs:
    """Begin to write into the run folder, and say what a person should know before the first step. A collective.

    Raises AgreedError.
    """
    run_dir = Path(config.run.dir)
    data = (inputs.sources, inputs.validation)
    facts = world.agree(lambda: describe_data(config, *data, state.cursor), main_only=True)
    moved = world.agree(lambda: leave_behind(config, state.home, state.step), main_only=True)
    world.agree(lambda: describe_run(run_dir, config, state.step, state.origin, world.size), main_only=True)
    run_log = RunLog(config, state.step, world, bits_per_nat(inputs.validation))
    scores = validation_scores(run_dir) if world.is_main else {}
    patience = LATE + config.run.slow_timeout
    writer = CheckpointWriter(state.home, inputs.tokenizer.model, config.checkpoint, world, patience)
    saver = Saver(config, inputs.plan, writer, world, state.resumed, state.identity, state.cursor, scores)

    for line in world.agree(lambda: shared_documents(*data), main_only=True):
        log.warning(line)  # on the terminal of rank 0
    notes = [f"run folder {run_dir}", state.origin, *moved, *run_log.notes, describe_shape(state.shape)]
    notes += facts
    notes += inputs.plan.reasons
    notes.append(disk_use(config))
    if config.parallel.offload and world.device.type == "cpu":
        notes.append("parallel.offload=true makes no difference here: there is no GPU, all is in host memory already")
    for line in notes:
        say(world, line)
    return Outputs(run_log, saver)


# ---- the run


def train(config: Config, world: World, watch: Watchdog | None = None) -> None:
    """One run, from where its folder stands to its last step, or to an agreed stop. Raises as `train_from` does."""
    watch = watch or Watchdog(world, config.run)
    inputs = open_inputs(config, world, watch)
    state = build_state(inputs, config, world)
    train_from(state, inputs, config, world, watch)


def train_from(state: State, inputs: Inputs, config: Config, world: World, watch: Watchdog) -> None:
    """The steps that are left, with all that a run writes.

    Raises ValueError; Interrupted where a stop left the evaluation after the last step undone.
    """
    run = config.run
    if state.step >= run.steps and not state.owes_evaluation:
        SideExports(config, state.resumed, world.is_main).finish()  # one that went with the process that made it
        say(world, nothing_to_do(run.dir, state.step, run.steps))
        return
    where = (state.step, world.device.type == "cuda", state.cursor, inputs.validation)
    loader = world.agree(lambda: train_loader(config, inputs.plan, world.rank, inputs.sources, *where))
    outputs = open_outputs(state, inputs, config, world)
    stopped = take_steps(loader, state, inputs, outputs, config, world, watch)
    outputs.log.checkpoint(outputs.saver.finish())
    outputs.log.close()
    watch.stop.drain()
    watch.at("export")
    outputs.saver.finish_exports()
    if best := outputs.saver.best():
        say(world, best)
    if stopped:
        left = " but for its evaluation" if config.evaluates(state.step) else ""
        what = f"stopped by {reason(stopped)} after step {state.step}{left}, checkpoint saved"
        say(world, f"{what}; the same command resumes from there")
    if stopped and state.step == run.steps:
        raise Interrupted(stopped)


def take_steps(
    loader: StatefulDataLoader,
    state: State,
    inputs: Inputs,
    outputs: Outputs,
    config: Config,
    world: World,
    watch: Watchdog,
) -> int:
    """Every step that is left, and what is due after each. Returns the stop that ended them early, or 0. A collective.

    Raises AgreedError.
    """
    run = config.run
    plan = inputs.plan
    model = state.model
    sampler = state.sampler
    recorder = state.recorder
    mask_id = inputs.tokenizer.mask_id
    probe = Probe(model, config, mask_id, world)
    pair = GradientPair(model)
    profiler = Profiler(config.monitor, Path(run.dir), world)
    graphs = GraphCount(config.parallel.compile)
    if sampler.fits("once") and state.resumed is None:
        fit_rates(probe, state, inputs, config, world)

    batches = iter(loader)
    stopped = evaluation(state, inputs, outputs, config, world, watch) if state.owes_evaluation else 0
    model.train()
    recorder.resume_clock()
    outputs.log.start_clock()
    while state.step < run.steps and not stopped:
        profiler.before(state.step)
        if state.step % GARBAGE_EVERY == 0:
            gc.collect(1)
        watch.at("rates", state.step)
        process = sampler.process(state.step / run.steps)
        draws = process.draw(run.seed, state.step, config.slots_per_step, world.size)
        sums = recorder.new_sums()
        for micro_step in range(plan.accumulation):
            model.set_requires_all_reduce(micro_step == plan.accumulation - 1)  # HSDP: copies add up once a step
            watch.at("data")
            batch = recorder.wait_for(batches)
            watch.at("masking")
            drawn = draws.at(batch.slots.numpy())
            masked_batch = process.corrupt(batch.ids, batch.eligible, batch.uniforms, drawn, mask_id).to(world.device)
            watch.at("forward")
            ce = masked_cross_entropy(model, masked_batch, batch.segments, plan.rows_per_slot)
            losses = row_losses(ce, masked_batch)
            watch.at("backward")
            (losses.sum() / plan.tokens_per_step).backward()  # over the whole global batch: FSDP adds the ranks up
            watch.at("statistics")
            statistics = row_statistics(ce.detach(), masked_batch, config.diffusion.target)
            eligible = int(batch.eligible.sum()) * plan.rows_per_slot
            recorder.add_micro_step(sums, losses.detach(), statistics, process.row_cells(drawn), len(ce), eligible)
            recorder.add_sources(sums, losses.detach(), batch.samples[:, 0])
        if pair.half:
            recorder.add_pair(sums, pair.compare() / config.parallel.replicate)  # each copy adds the same
        elif due_after(config, state.step + 2).probe and not due_after(config, state.step + 1).interrupts:
            pair.keep()  # no pair across an evaluation or a checkpoint
        watch.at("sums")
        recorder.add_own(sums)
        world.sum(sums)
        watch.at("optimizer")
        lr = learning_rate(config.optim, state.step, run.steps)
        norm, skipped = optimizer_step(state.optimizer, sums.isfinite().all(), lr, config.optim.clip_norm)
        watch.at("records")
        if state.average is not None:
            state.average.update(model, skipped)
        state.step += 1
        row_counts = np.bincount(process.row_cells(draws), minlength=config.diffusion.bins)
        sampler.add(recorder.statistics(sums), row_counts, skipped)
        recorder.add_step(state.step, process, draws, row_counts, sums, norm, skipped, lr)
        if sampler.due(state.step):
            sampler.use(world.agree(sampler.fitted, main_only=True))  # rank 0 fits, so that all have the same bits

        stopped = watch.stop.poll()  # a pair that is half done ends with the run
        due = due_after(config, state.step, reason(stopped))
        if due.log:
            watch.at("log")
            log.debug("after step %d: %s", state.step, due)
            records = recorder.flush()  # the only place where the host waits for the device
            graphs.report(state.step)
            if due.probe:
                watch.at("probe")
                components, seconds, share = probe.decompose(process, inputs.validation, state.step)
                records[-1] |= {COMPONENTS: components, DENSITY: sampler.picture()}
                outputs.log.probe_cost(state.step, seconds, share)
            outputs.log.steps(records, recorder, loader.dataset, keep_last=due.interrupts)
            outputs.log.checkpoint(outputs.saver.poll())
        if due.evaluation:
            stopped = evaluation(state, inputs, outputs, config, world, watch)
        if due.save or stopped:
            watch.at("checkpoint")
            outputs.log.checkpoint(outputs.saver.finish())  # the one before may still be written
            outputs.log.sync()
            tensors = store.training_tensors(model, state.optimizer, state.average, sampler)
            outputs.saver.save(state.step, tensors, recorder.state())
            gc.collect()
        if due.probe or due.interrupts:
            recorder.resume_clock()
            graphs.resume()
    profiler.close()
    return stopped


# ---- what the run calls


def evaluation(state: State, inputs: Inputs, outputs: Outputs, config: Config, world: World, watch: Watchdog) -> int:
    """Evaluate the weights that count (the average where the run keeps one) and record it. A collective.

    Returns 0, or the stop that came first: then nothing is recorded.
    """
    names = split_names(inputs.validation, [source.path for source in config.data.sources])
    settings = (config.eval, config.data.sequence_length, config.data.document_mask, inputs.tokenizer.mask_id)
    model = state.model
    model.eval()
    try:
        with state.average.swapped_into(model) if state.average is not None else nullcontext():
            found = [
                evaluate_split(model, split, name, *settings, world, watch)
                for name, split in zip(names, inputs.validation, strict=True)
            ]
    except Interrupted as interruption:
        return interruption.number
    finally:
        model.train()
    outputs.log.evaluation(state.step, found)
    outputs.saver.scores[state.step] = float(np.mean([one.nelbo for one in found]))
    return 0


def fit_rates(probe: Probe, state: State, inputs: Inputs, config: Config, world: World) -> None:
    """Fit p(t) to the weights before the first step. A collective."""
    fit = config.diffusion
    size = f"{fit.fit_rates} rates x {fit.fit_sequences} sequences x {fit.fit_masks} masks"
    say(world, f"fitting p(t) to {size}")
    fitted = probe.fit(state.sampler.process(0.0), inputs.sources)
    state.sampler.use(world.agree(lambda: fitted.p, main_only=True))  # the same bits everywhere


def bits_per_nat(validation: list[PreparedSplit]) -> float:
    """Bits per byte of one nat per eligible token, on this data."""
    tokens = sum(split.eligible_tokens for split in validation)
    return tokens / sum(split.bytes for split in validation) / math.log(2)


def nothing_to_do(run_dir: str, done: int, wanted: int) -> str:
    """Why a run that has done at least `wanted` steps does not train."""
    if done > wanted:
        return (
            f"{run_dir} has done {done} steps, more than run.steps={wanted}: nothing to train; raise run.steps to "
            "continue, or go back to an older checkpoint with checkpoint.resume=STEP"
        )
    return f"{run_dir} is complete: {done} of {wanted} steps; raise run.steps to train further, or evaluate it"


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(
        prog="python -m mdmtrain.train",
        description="Pretrain a masked diffusion language model; run under torchrun for several ranks. "
        "Started again with the same arguments, a run resumes from its newest checkpoint.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=HelpAction)
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG | section.key=value", help="YAML files, later ones on top, then overrides"
    )
    config = configuration.load(parser.parse_args(arguments).config)
    survive_terminal()  # what is printed is in the run folder too
    world = init_world(LATE + config.run.slow_timeout, Path(config.run.dir) / "logs")
    gc.freeze()  # what imports have left
    gc.disable()  # `train` does it at the same steps on all ranks: they would wait for each other's otherwise
    folder = removed_if_refused(Path(config.run.dir)) if world.is_main else nullcontext()
    with folder, Watchdog(world, config.run) as watch, out_of_memory(config, world), loader_errors():
        train(config, world, watch)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
