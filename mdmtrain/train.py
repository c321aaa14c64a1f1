"""Pretrain a masked diffusion language model.

    torchrun --standalone --nproc-per-node 2 -m mdmtrain.train CONFIG... [section.key=value ...]
    python -m mdmtrain.train CONFIG... [section.key=value ...]            one process

Read `train` from top to bottom: that is the whole run. To change what a step does, change it there.
"""

import gc
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.export import SideExports
from mdmtrain.checkpoint.resume import (
    changes,
    choose_checkpoint,
    continued,
    describe_resume,
    leave_behind,
    load_initial_weights,
    run_identity,
)
from mdmtrain.checkpoint.run_folder import RunLock, add_to_history, describe_run, removed_if_refused
from mdmtrain.checkpoint.writer import CheckpointWriter
from mdmtrain.config import Config, resolve
from mdmtrain.config_help import HelpAction
from mdmtrain.data.checks import describe_cache, describe_mixture, shared_documents
from mdmtrain.data.loader import check_splits, describe_rows, loader_errors, open_splits, train_loader, validation_rows
from mdmtrain.data.order import START
from mdmtrain.diffusion.objective import row_losses, row_statistics
from mdmtrain.diffusion.sampler import RateSampler, token_table
from mdmtrain.evaluate import Evaluation, evaluate_split, split_names
from mdmtrain.model.presets import describe_shape, model_shape
from mdmtrain.model.transformer import masked_cross_entropy
from mdmtrain.monitor.logs import CommandParser, log, log_to_file, survive_terminal, user_errors
from mdmtrain.monitor.metrics import COMPONENTS, DENSITY, MetricsLog, disk_use, evaluated, thinned, validation_scores
from mdmtrain.monitor.profile import Profiler, out_of_memory
from mdmtrain.monitor.progress import TrainingProgress
from mdmtrain.monitor.recorder import StepRecorder
from mdmtrain.optim import EMA, GradientPair, build_optimizer, learning_rate, optimizer_step
from mdmtrain.parallel.parallelize import GraphCount, build_model, data_mesh, init_weights
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import AgreedError, Interrupted, World, init_world, reason, set_timeout
from mdmtrain.probe import Probe

LATE = 5.0  # minutes after the watchdog, in which torch's own timeouts end a run that even the watchdog could not
GARBAGE_EVERY = 50  # steps: when Python looks for young cycles, on all ranks together; for old ones, at a save


def train(config: Config, world: World, watch: Watchdog | None = None) -> None:
    """One run, from where its folder stands to its last step, or to an agreed stop.

    Raises ValueError; Interrupted where the stop left an evaluation after the last step.
    """
    run, run_dir = config.run, Path(config.run.dir)
    plan = world.agree(lambda: resolve(config, world.size))
    watch = watch or Watchdog(world, run)
    stop = watch.stop

    # ---- what there is: folder, data, tokenizer, model
    main_dir = run_dir if world.is_main else None
    lock = world.agree(lambda: RunLock(run_dir) if world.is_main else None)  # held until the process ends
    world.agree(lambda: log_to_file(run_dir / "logs", world.rank))
    opened = world.agree(lambda: open_splits(config.data, ("train", "validation")), main_only=True)
    world.agree(lambda: check_splits(opened, (config.data.verify, "size"), (world.rank, world.size)))
    watch.at("preparation")  # that may have taken long, and so may what follows
    sources, validation = opened
    wanted = (config.eval.rows, config.data.sequence_length, config.data.document_mask)
    world.agree(lambda: [validation_rows(split, *wanted) for split in validation])  # said now, not after hours
    tokenizer = world.agree(lambda: sources[0].tokenizer())
    shape = world.agree(lambda: model_shape(config.model, tokenizer.vocab_size))
    model = build_model(shape, config.parallel, world)
    set_timeout(data_mesh(config.parallel, world), LATE + run.slow_timeout)
    optimizer = build_optimizer(model, config.optim)
    average = None
    listed = config.diffusion.isad_tokens
    delimiters = world.agree(lambda: token_table(listed, tokenizer.pieces(), "diffusion.isad_tokens"))
    sampler = RateSampler(config.diffusion, world.device, delimiters)

    # ---- where it stands: a checkpoint of this run, another run's weights, or a fresh start
    identity = run_identity(config, shape, tokenizer, [source.fingerprint for source in sources])
    home = world.agree(lambda: store.home(config))
    resumed = choose_checkpoint(config, home, identity, world)
    if resumed is None and config.checkpoint.init_from is None:
        init_weights(model, run.seed)
        origin = f"fresh weights from seed {run.seed}"
    elif resumed is None:
        origin = f"weights of {load_initial_weights(config, identity, tokenizer, model, world)}"
    if config.optim.ema_decay is not None:
        average = EMA(model, config.optim.ema_decay)
    step, cursor, recorder = 0, START, StepRecorder(config, plan, world.device, world.rank)
    probe, pair = Probe(model, config, tokenizer.mask_id, world), GradientPair(model)
    if resumed is not None:
        store.load(resumed, store.training_tensors(model, optimizer, average, sampler), world)
        store.spread_adam_step(optimizer)
        sampler.restored()
        meta = world.agree(lambda: store.read_meta(resumed), main_only=True)
        step, cursor = meta["step"], continued(meta, identity)
        recorder.restore(meta["recorder"], cursor, same_batch=not changes(meta, identity))
        origin = describe_resume(resumed, meta, identity, config)
    owes = config.evaluates(step) and step <= run.steps
    owed = world.agree(lambda: owes and not evaluated(run_dir, step), main_only=True)
    if step >= run.steps and not owed:
        SideExports(config, resumed, world.is_main).finish()  # one that went with the process that made it
        say(world, nothing_to_do(run_dir, step, run.steps))
        return
    pin = world.device.type == "cuda"
    loader = world.agree(lambda: train_loader(config, plan, world.rank, sources, step, pin, cursor, validation))
    mixed = world.agree(lambda: describe_mixture(config, sources, loader.dataset.order, cursor))
    mixed += world.agree(lambda: describe_cache(config, sources, validation))
    notes = world.agree(lambda: leave_behind(config, home, step), main_only=True)
    world.agree(lambda: describe_run(run_dir, config, step, origin, world.size), main_only=True)
    metrics = world.agree(lambda: MetricsLog(run_dir, step, config.monitor.tensorboard) if world.is_main else None)
    notes += metrics.notes if metrics is not None else []
    prompts, L = [source for source in sources if source.prompts], config.data.sequence_length
    rows = world.agree(lambda: [describe_rows(source, L) for source in prompts], main_only=True) + mixed
    for line in world.agree(lambda: shared_documents(sources, validation), main_only=True):
        log.warning(line)  # on the terminal of rank 0
    for line in (
        f"run folder {run_dir}", origin, *notes, describe_shape(shape), *rows, *plan.reasons, disk_use(config)
    ):  # fmt: skip
        say(world, line)
    if config.parallel.offload and world.device.type == "cpu":
        say(world, "parallel.offload=true makes no difference here: there is no GPU, all is in host memory already")
    if sampler.fits("once") and resumed is None:
        fit = config.diffusion
        say(world, f"fitting p(t) to {fit.fit_rates} rates x {fit.fit_sequences} sequences x {fit.fit_masks} masks")
        p = probe.fit(sampler.process(0.0), sources)
        sampler.use(world.agree(lambda: p, main_only=True))  # the same bits everywhere

    # ---- the loop
    device = world.device
    splits = list(zip(split_names(validation, [s.path for s in config.data.sources]), validation, strict=True))
    batches = iter(loader)
    progress = TrainingProgress(step, run.steps, world.is_main)
    exports = SideExports(config, resumed, world.is_main)
    writer = CheckpointWriter(home, tokenizer.model, config.checkpoint, world, LATE + run.slow_timeout)
    bits_per_nat = sum(v.eligible_tokens for v in validation) / sum(v.bytes for v in validation) / np.log(2)
    graphs = GraphCount(config.parallel.compile)
    profiler = Profiler(config.monitor, run_dir, world)
    scores = validation_scores(run_dir) if world.is_main else {}

    def evaluation() -> int:
        """Evaluate after `step` steps and record it; where a stop comes first, nothing is recorded. The stop, or 0."""

        def between() -> None:
            watch.at("evaluation")
            stop.check()

        try:
            stoppable = replace(world, between=between)
            found = in_loop_evaluation(model, average, splits, config, tokenizer.mask_id, stoppable)
        except Interrupted as interruption:
            return interruption.args[0]
        for one in found:
            progress.note(f"step {step}  {one}")
        scores[step] = float(np.mean([one.nelbo for one in found]))
        if metrics is not None:
            metrics.write([{"step": step, **asdict(one)} for one in found])
        return 0

    stopped = evaluation() if owed else 0  # a stop came before it, or in the middle of it
    model.train()
    recorder.resume_clock()
    progress.start_clock()
    while step < run.steps and not stopped:
        profiler.before(step)
        if step % GARBAGE_EVERY == 0:
            gc.collect(1)
        process = sampler.process(step / run.steps)
        draws = process.draw(run.seed, step, config.slots_per_step, world.size)
        sums = recorder.new_sums()
        for micro_step in range(plan.accumulation):
            model.set_requires_all_reduce(micro_step == plan.accumulation - 1)  # HSDP: copies add up once a step
            watch.at("data", step)
            batch = recorder.wait_for(batches)
            watch.at("forward and backward")
            drawn = draws.at(batch.slots.numpy())
            masked_batch = process.corrupt(batch.ids, batch.eligible, batch.uniforms, drawn, tokenizer.mask_id).to(
                device
            )
            ce = masked_cross_entropy(model, masked_batch, batch.segments, plan.rows_per_slot)
            losses = row_losses(ce, masked_batch)
            (losses.sum() / plan.tokens_per_step).backward()  # over the whole global batch: FSDP adds the ranks up
            statistics = row_statistics(ce.detach(), masked_batch, config.diffusion.target)
            eligible = int(batch.eligible.sum()) * plan.rows_per_slot
            recorder.add_micro_step(sums, losses.detach(), statistics, process.row_cells(drawn), len(ce), eligible)
        if pair.half:
            recorder.add_pair(sums, pair.compare() / config.parallel.replicate)  # each copy adds the same
        elif probe.due(step + 2) and not (config.evaluates(step + 1) or config.saves(step + 1)):
            pair.keep()  # no pair across an evaluation or a checkpoint
        watch.at("optimizer")
        recorder.add_own_seconds(sums)
        world.sum(sums)
        lr = learning_rate(config.optim, step, run.steps)
        norm, skipped = optimizer_step(optimizer, sums.isfinite().all(), lr, config.optim.clip_norm)
        if average is not None:
            average.update(model, skipped)
        step += 1
        row_counts = np.bincount(process.row_cells(draws), minlength=config.diffusion.bins)
        sampler.add(recorder.statistics(sums), row_counts, skipped)
        recorder.add_step(step, process, draws, row_counts, sums, norm, skipped, lr)
        if sampler.due(step):
            sampler.use(world.agree(sampler.fitted, main_only=True))  # rank 0 fits, so that all have the same bits

        stopped = stop.poll() if not pair.half else 0  # nor across a stop: one step later
        last = step == run.steps or bool(stopped)
        evaluating = config.evaluates(step)
        saving = config.saves(step) or last
        if step % config.monitor.log_every == 0 or evaluating or saving or probe.due(step):
            watch.at("log")
            records = recorder.flush()  # the only place where the host waits for the device
            graphs.report(step)
            if probe.due(step):
                watch.at("probe")
                components, seconds, share = probe.decompose(process, validation, step)
                records[-1] |= {COMPONENTS: components, DENSITY: sampler.picture()}
                if metrics is not None:
                    metrics.probe_cost(step, seconds, share)
            if metrics is not None:
                metrics.write(thinned(records, config.monitor.record_every, evaluating or saving))
                for record in records:
                    if record["skipped"]:
                        metrics.skipped(record["step"], loader.dataset.samples(record["step"] - 1))
            progress.update(records[-1], bits_per_nat)
            check_skips(records, recorder.skips_in_a_row, run.max_skips, run_dir)
            if slow := recorder.slow_rank():
                log.warning("step %d: %s", step, slow)
            if saving:
                watch.at("checkpoint")  # the one before may still be written
            announce(writer.finish() if saving else writer.poll(), progress, exports, main_dir)
        if evaluating and not stopped:
            stopped = evaluation()
            if stopped and not saving:
                saving = True
                announce(writer.finish(), progress, exports, main_dir)
        if saving:
            watch.at("checkpoint")
            if metrics is not None:
                metrics.sync()
            tensors = store.training_tensors(model, optimizer, average, sampler)
            meta = {
                "tokens": cursor.at(step, config.slots_per_step, plan.tokens_per_step).tokens,
                "cursor": asdict(cursor),
                "identity": identity,
                "has_average": average is not None,
                "recorder": recorder.state(),
                "config": config.model_dump(mode="json"),
                "working_directory": os.getcwd(),  # which relative paths in it are relative to
            }
            writer.save(step, tensors, meta, scores)
            gc.collect()
        if evaluating or saving or probe.due(step):
            recorder.resume_clock()
            graphs.resume()

    announce(writer.finish(), progress, exports, main_dir)
    stop.drain()
    profiler.close()
    progress.close()
    watch.at("export")
    exports.finish()
    if metrics is not None:
        metrics.close()
    if config.checkpoint.keep_best and (best := store.best_of(store.complete_checkpoints(home), scores)):
        say(world, f"best checkpoint by validation NELBO ({scores[store.step_of(best[0])]:.4f}): {best[0]}")
    if stopped:
        left = " but for its evaluation" if config.evaluates(step) else ""
        what = f"stopped by {reason(stopped)} after step {step}{left}, checkpoint saved"
        say(world, f"{what}; the same command goes on from there")
    del lock
    if stopped and step == run.steps:
        raise Interrupted(stopped)


def in_loop_evaluation(
    model, average: EMA | None, splits: list, config: Config, mask_id: int, world: World
) -> list[Evaluation]:
    """The validation NELBO of the weights that count: the average where the run keeps one."""
    arguments = (config.eval, config.data.sequence_length, config.data.document_mask, mask_id, world)
    model.eval()
    try:
        with average.swapped_into(model) if average is not None else nullcontext():
            return [evaluate_split(model, split, name, *arguments) for name, split in splits]
    finally:
        model.train()


# ---- small things


def announce(checkpoint: Path | None, progress: TrainingProgress, exports: SideExports, run_dir: Path | None) -> None:
    """Say that a checkpoint is committed, and start what waits for that. run_dir: where to record it; on rank 0."""
    if checkpoint is not None:
        if run_dir is not None:
            add_to_history(run_dir, "checkpoint", step=store.step_of(checkpoint))
        progress.note(f"step {store.step_of(checkpoint)}  checkpoint {checkpoint}")
        exports.start(checkpoint)


def check_skips(records: list[dict], in_a_row: int, most: int, run_dir: Path) -> None:
    """Report skipped steps; raise ValueError when there were too many in a row."""
    for record in records:
        if record["skipped"]:
            log.warning("step %d skipped: its loss or gradient was not finite", record["step"])
    if in_a_row >= most:
        raise AgreedError(
            f"{in_a_row} steps in a row had a non-finite loss or gradient: lower optim.lr or raise optim.warmup_steps; "
            f"{run_dir} goes on from its last checkpoint"
        )


def nothing_to_do(run_dir: Path, done: int, wanted: int) -> str:
    """Why a run that has done at least `wanted` steps does not train."""
    if done > wanted:
        return (
            f"{run_dir} has done {done} steps, more than run.steps={wanted}: nothing to train; raise run.steps to "
            "continue, or go back to an older checkpoint with checkpoint.resume=STEP"
        )
    return f"{run_dir} is complete: {done} of {wanted} steps; raise run.steps to go on, or evaluate it"


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)
        log.info("%s", text)  # the terminal may be gone


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
