"""The configuration of a run: one typed, frozen tree.

Files are YAML with YAML 1.2 scalars (1e-3 is a number, `off` is a string). A later file overrides an earlier one, and
`section.key=value` arguments override all files. `resolve` derives the numbers that also depend on the number of ranks
(`RunPlan`), each with its reason. Nothing here is mutated.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from mdmtrain import yaml12


def expand_path(text: str) -> str:
    """A configured path with `~`, `$NAME` and `${NAME}` replaced.

    Raises ValueError for a name without a value; otherwise a folder with that name would be created.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if "$" in path:
        unset = re.findall(r"\$\{?(\w+)", path)
        problem = f"environment variable {unset[0]} is not set" if unset else "'$' must start an environment variable"
        raise ValueError(f"{text}: {problem}: set it, or write the path out")
    if path.startswith("~"):
        raise ValueError(f"{text}: no home folder is known for {path.split('/')[0]}: write the path out")
    return path


PathText = Annotated[str, AfterValidator(expand_path)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(Section):
    """The run folder, the seed, the length of the run and the size of a step."""

    dir: PathText = Field(min_length=1, description="run folder: configuration, metrics, checkpoints, logs")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random number of the run")
    steps: int = Field(gt=0, description="optimizer steps in the whole run")
    global_batch: int = Field(gt=0, description="rows (sequences) per step, over all ranks and micro-steps")
    micro_batch: int = Field(gt=0, description="largest number of rows in one forward pass of a rank")
    max_skips: int = Field(
        10, gt=0, description="the run stops with an error after this many non-finite (skipped) steps in a row"
    )
    deterministic: bool = Field(
        False,
        description="use only algorithms that give the same bits each time; slower on GPUs, and no change on CPUs",
    )
    time_limit: float | None = Field(
        None, gt=0, description="minutes after which the run saves a checkpoint and stops; null: no limit"
    )
    step_timeout: float = Field(
        10.0, gt=0, description="minutes without progress in a step after which the run ends with an error"
    )
    slow_timeout: float = Field(
        60.0,
        gt=0,
        description="the same, in minutes, for preparation, the first two steps, evaluations, probes and saves",
    )


class ModelConfig(Section):
    """The shape of the transformer: a preset, and keys that override it. null: the preset's value, or the default."""

    preset: str | None = Field(None, description="a shape from model/presets.py; the fields below override it")
    d_model: int | None = Field(None, gt=0, description="width of the residual stream")
    n_layers: int | None = Field(None, gt=0, description="number of blocks")
    n_heads: int | None = Field(None, gt=0, description="query heads")
    n_kv_heads: int | None = Field(
        None,
        gt=0,
        description="key/value heads; n_heads: multi-head attention; fewer: grouped-query attention",
    )
    head_dim: int | None = Field(None, gt=0, description="width of one head; default: d_model / n_heads")
    d_ff: int | None = Field(None, gt=0, description="hidden width of the SwiGLU feed-forward")
    vocab_size: int | None = Field(
        None, gt=0, description="rows of the embedding; default: the tokenizer's size rounded up to a multiple of 64"
    )
    qk_norm: bool | None = Field(None, description="RMSNorm on queries and keys, per head")
    causal: bool | None = Field(
        None, description="causal attention, for an autoregressive reference model (diffusion.objective=ar)"
    )
    tied_embeddings: bool | None = Field(None, description="embedding and output head share one matrix")
    rope_theta: float | None = Field(None, gt=0, description="base of the rotary position frequencies")
    norm_eps: float | None = Field(None, gt=0, description="epsilon of RMSNorm")
    init_std: float | None = Field(
        None, gt=0, description="standard deviation of the initial weights (residual outputs: / sqrt(2 n_layers))"
    )


class DataSource(Section):
    """One prepared folder among the sources of a run."""

    path: PathText = Field(min_length=1, description="folder written by tools/prepare_data.py: a path or an fsspec URL")
    weight: float = Field(
        1.0, ge=0, description="share of the samples, relative to the other sources; 0: only in data.phases"
    )
    max_epochs: float | None = Field(
        None, gt=0, description="a run that would read the source more often than this is refused; null: no limit"
    )


class DataPhase(Section):
    """Weights that hold from a step on."""

    from_step: int = Field(gt=0, description="first step (from 0) with these weights")
    weights: tuple[float, ...] = Field(
        min_length=1, description="share of the samples of each source, in the order of data.sources; 0: none"
    )


class DataConfig(Section):
    """Which prepared data is read, how rows are cut from it, and how it is loaded."""

    sources: tuple[DataSource, ...] = Field(min_length=1, description="prepared folders and their weights")
    phases: tuple[DataPhase, ...] = Field((), description="weights that replace those of the sources at given steps")
    sequence_length: int = Field(gt=0, description="tokens per row")
    document_mask: bool = Field(False, description="tokens attend only to tokens of the same document")
    random_length_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="fraction of rows cut to a random length (one of 16 multiples of sequence_length/16); "
        "rows of prompts and responses are not cut",
    )
    shuffle_shards: int | None = Field(
        None,
        gt=0,
        description="rows of so many shards are shuffled together, the shards in a random order each epoch; null: all "
        "rows of a source. Needed for a source in an object store that does not fit into the cache",
    )
    verify: Literal["sha256", "size"] = Field(
        "sha256",
        description="check of the shards before training; shards from an object store are always checked by sha256 "
        "when they arrive",
    )
    workers: int = Field(2, ge=0, description="loader processes per rank; 0: the training process loads the data")
    prefetch: int = Field(4, gt=0, description="micro-batches that each loader process keeps ready")
    cache_dir: PathText | None = Field(
        None,
        min_length=1,
        description="folder on a local disk of each node for shards from an object store; required with such sources",
    )
    cache_gb: float = Field(100.0, gt=0, description="most gigabytes (10^9 bytes) in data.cache_dir, on each node")

    @model_validator(mode="after")
    def _mixes(self) -> "DataConfig":
        steps = [phase.from_step for phase in self.phases]
        weights = [self.weights, *(p.weights for p in self.phases)]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError(f"phases must be in the order of their steps, and from_step has {steps}")
        for phase in self.phases:
            if len(phase.weights) != len(self.sources):
                raise ValueError(
                    f"the phase from step {phase.from_step} has {len(phase.weights)} weights for {len(self.sources)} "
                    "sources: give each one a weight (0: none)"
                )
        for one, step in zip(weights, [0, *steps], strict=True):
            if not any(one):
                raise ValueError(f"all weights are 0 from step {step} on: give a source some")
        for source, shares in zip(self.sources, zip(*weights, strict=True), strict=True):
            if not any(shares):
                raise ValueError(f"{source.path} has weight 0 throughout: give it some, or leave it out")
        for source in self.sources:
            if "://" in source.path and self.cache_dir is None:
                raise ValueError(
                    f"{source.path} is read through a cache: give data.cache_dir, a folder on a local disk of each node"
                )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What the sources are called in records: their last folder, with their number where several have the same."""
        last = [source.path.rstrip("/").rsplit("/", 1)[-1] for source in self.sources]
        return tuple(name if last.count(name) == 1 else f"{name}-{n}" for n, name in enumerate(last, 1))

    @property
    def weights(self) -> tuple[float, ...]:
        """Those of the sources, which hold until the first phase."""
        return tuple(source.weight for source in self.sources)


class DiffusionConfig(Section):
    """How masking rates and masks are drawn and how tokens are weighted. docs/mathematics.md derives each estimator."""

    eps: float = Field(1e-3, gt=0, lt=0.5, description="smallest masking rate (masks=counted has none)")
    rate_low: float | None = Field(
        None, gt=0, lt=1, description="lowest masking rate of the training; changes the objective; null: eps"
    )
    rate_high: float | None = Field(
        None, gt=0, le=1, description="highest masking rate of the training; changes the objective; null: 1"
    )
    schedule: Literal["linear", "cosine"] = Field("linear", description="noise schedule, used with sampler=uniform")
    strata: Literal["none", "rank", "global"] = Field(
        "global",
        description="stratification of the masking rates. global: over the global batch (StraTS); rank: over the rows "
        "of each rank; none: independent rates",
    )
    sampler: Literal["uniform", "ppots"] = Field(
        "uniform", description="density of the masking rate. uniform: the noise schedule; ppots: fitted (P-POTS)"
    )
    target: Literal["loss", "gradient"] = Field(
        "gradient", description="ppots: the quantity whose second moment is fitted"
    )
    form: Literal["histogram", "epr"] = Field(
        "histogram",
        description="ppots: form of the fitted density. histogram: one value per bin; epr: the parametric family of "
        "the P-POTS paper",
    )
    when: Literal["online", "once"] = Field(
        "online",
        description="ppots: time of the fit. online: every refit_every steps; once: before training, from "
        "fit_rates x fit_sequences x fit_masks forward passes",
    )
    fit_rates: int = Field(70, gt=0, description="when=once: masking rates at which the fit measures the loss")
    fit_sequences: int = Field(15, gt=0, description="when=once: training sequences for each of these rates")
    fit_masks: int = Field(15, gt=0, description="when=once: masks for each rate and sequence")
    bins: int = Field(
        64, ge=8, le=1024, multiple_of=8, description="bins of the masking rate, for the density and for statistics"
    )
    floor: float = Field(
        0.2,
        gt=0,
        le=1,
        description="ppots: share of the uniform density in the density; limits importance weights to 1/floor",
    )
    refit_every: int = Field(25, gt=0, description="ppots: steps between fits")
    statistics_decay: float = Field(0.99, ge=0, lt=1, description="decay of each bin's statistics per step")
    min_hits: int = Field(
        50, gt=0, description="ppots: the density stays uniform until every bin has had this many rows"
    )
    masks: Literal["independent", "counted"] = Field(
        "independent",
        description="independent: each position is masked with probability t; "
        "counted: a number k is drawn, and k of the P eligible positions are masked",
    )
    views: Literal["single", "mirror", "mirror_dedup", "complement"] = Field(
        "single",
        description="rows per sequence. single: one; mirror: a pair with antithetic masks (MIRROR); mirror_dedup: the "
        "same, but a position that both rows mask counts once; complement: a pair with complementary masks",
    )
    weights: Literal["rate", "count"] = Field(
        "rate",
        description="weight of a masked token. rate: 1/t; count: the mean of 1/t given the number of masks (always so "
        "with masks=counted)",
    )
    objective: Literal["nelbo", "plain", "bell", "ar"] = Field(
        "nelbo",
        description="weight omega(t) of a masking rate. nelbo: 1; plain: 2t/(1+eps), the plain cross-entropy; bell: "
        "the density of Beta(bell, bell); ar: the next-token loss of a causal model, for comparison",
    )
    bell: float = Field(3.0, ge=1, description="objective=bell: a of Beta(a, a)")
    anneal_fraction: float = Field(
        0.0, ge=0, le=1, description="omega moves to 1 (the NELBO) over this last fraction of the run"
    )
    isad_tokens: tuple[str | int, ...] = Field(
        (), description="ISAD: token ids or pieces that are masked more often; biased, see docs/mathematics.md"
    )
    isad_delta: float = Field(0.2, gt=0, le=1, description="ISAD: added to the masking rate of these tokens")
    syrm_tokens: tuple[str | int, ...] = Field(
        (),
        description="SyRM: token ids or pieces that are also masked in prompts; changes the objective, see "
        "docs/prompts.md",
    )

    @property
    def rows_per_slot(self) -> int:
        return 1 if self.views == "single" else 2

    @model_validator(mode="after")
    def _has_an_estimator(self) -> "DiffusionConfig":
        if self.schedule == "cosine" and (self.sampler == "ppots" or self.counts or self.views == "complement"):
            raise ValueError(
                "schedule=cosine cannot be combined with sampler=ppots, masks=counted, weights=count or "
                "views=complement: leave these out, or set schedule=linear"
            )
        low = self.rate_low or self.eps
        high = self.rate_high or 1.0
        if low >= high:
            raise ValueError(f"no masking rates between {low:g} and {high:g}: rate_low must be below rate_high")
        if self.windowed and (self.masks == "counted" or self.views == "complement" or self.schedule == "cosine"):
            raise ValueError(
                "rate_low and rate_high cannot be combined with masks=counted, schedule=cosine or views=complement: "
                "leave one of them out"
            )
        if self.when == "once" and self.fit_rates * self.fit_sequences < 2 * self.bins:
            raise ValueError(
                f"fit_rates x fit_sequences must be at least {2 * self.bins}, so that the fit has samples in each of "
                f"the {self.bins} bins: raise one of them, or lower bins"
            )
        if self.weights == "count" and self.masks == "independent" and self.views != "single":
            raise ValueError(f"weights=count cannot be combined with views={self.views}: set masks=counted")
        if self.isad_tokens and (self.counts or self.views in ("mirror_dedup", "complement")):
            raise ValueError(
                "isad_tokens cannot be combined with masks=counted, weights=count, views=mirror_dedup or "
                "views=complement: leave one of them out"
            )
        if self.windowed and self.anneal_fraction > 0:
            raise ValueError(
                "anneal_fraction cannot be combined with rate_low or rate_high, because the NELBO needs all rates: "
                "leave one of them out"
            )
        if self.anneal_fraction > 0 and self.objective in ("nelbo", "ar"):
            raise ValueError(
                f"anneal_fraction has no effect with objective={self.objective}: use objective=plain or bell, or leave "
                "anneal_fraction out"
            )
        masking = (
            self.sampler == "ppots",
            self.schedule == "cosine",
            self.views != "single",
            self.counts,
            self.windowed,
            bool(self.isad_tokens),
            bool(self.syrm_tokens),
        )
        if self.objective == "ar" and any(masking):
            raise ValueError(
                "objective=ar masks nothing, so it cannot be combined with schedule=cosine, sampler=ppots, "
                "masks=counted, weights=count, pairs of views, rate_low, rate_high, isad_tokens or syrm_tokens: "
                "leave these out"
            )
        return self

    @property
    def windowed(self) -> bool:
        """Whether the configuration restricts the masking rates."""
        return self.rate_low is not None or self.rate_high is not None

    @property
    def trains_nelbo(self) -> bool:
        """Whether the expected loss is the NELBO (cut at eps), and not another objective."""
        return self.objective == "nelbo" and not self.windowed and not self.isad_tokens and not self.syrm_tokens

    @property
    def counts(self) -> bool:
        """Whether a token's weight depends on the number of masks in its row."""
        return self.masks == "counted" or self.weights == "count"


class OptimConfig(Section):
    """The optimizer, the learning-rate schedule and the weight average."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the blocks, AdamW for everything else"
    )
    lr: float = Field(gt=0, description="peak learning rate")
    muon_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the matrices that Muon updates, on the scale of lr; null: lr"
    )
    schedule: Literal["cosine", "wsd"] = Field(
        "cosine", description="learning rate after warm-up. cosine: cosine decay; wsd: constant, then linear decay"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: last fraction of the steps, in which lr decays")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate divided by the peak")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, on matrices only")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean of the gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean of the squared gradient")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW: epsilon in the denominator")
    clip_norm: float | None = Field(1.0, gt=0, description="clip the gradient to this norm; null: no clipping")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay of the weight average (EMA) per step; null: no average"
    )

    @model_validator(mode="after")
    def _has_muon(self) -> "OptimConfig":
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError(f"muon_lr={self.muon_lr:g} needs name=muon: set both, or leave muon_lr out")
        return self


class ParallelConfig(Section):
    """How the model is sharded over ranks, and how memory is saved. Only compute_dtype and float8 change results."""

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the forward and backward pass; parameters and reductions stay float32"
    )
    float8: bool = Field(
        False,
        description="multiply in float8 in the linear layers of the blocks (torchao, pip install mdmtrain[float8]); "
        "parameters, checkpoints, mdmtrain.evaluate and generate do not use it; needs a GPU of compute capability 8.9 "
        "or more, such as the H100; a CPU emulates it, slowly",
    )
    replicate: int = Field(
        1,
        gt=0,
        description="copies of the sharded model (HSDP); gradients are reduced within a copy, then over copies",
    )
    shard: int | None = Field(None, gt=0, description="ranks that shard one copy; null: all ranks / replicate")
    reshard_after_forward: bool = Field(True, description="free gathered block parameters between forward and backward")
    offload: bool = Field(
        False,
        description="keep parameters, gradients and optimizer state in host memory; the optimizer runs on the host",
    )
    activation_checkpointing: Literal["none", "full", "selective", "ops", "budget"] = Field(
        "none",
        description="activations that the backward pass computes again, to save memory. full: all of every block; "
        "selective: all of every recompute_every-th block; ops: those of every block except matrix products and "
        "attention; budget: those that the compiler finds cheapest (see recompute_budget)",
    )
    recompute_every: int = Field(
        2, gt=0, description="activation_checkpointing=selective: one block in this many is recomputed"
    )
    recompute_budget: float = Field(
        0.5,
        ge=0,
        le=1,
        description="activation_checkpointing=budget: share of its activations that a compiled block keeps",
    )
    compile: bool = Field(False, description="compile each block with torch.compile; the first steps take minutes")
    head_chunk: int = Field(
        4096, gt=0, description="number of masked positions for which the output head computes logits at once"
    )
    fused_head: bool = Field(
        False, description="use torch's fused linear cross-entropy (torch 2.13 or later); needs compute_dtype=float32"
    )

    @model_validator(mode="after")
    def _torch_can(self) -> "ParallelConfig":
        if self.activation_checkpointing == "budget" and not self.compile:
            raise ValueError(
                "activation_checkpointing=budget needs the compiler: set compile=true, or choose selective or ops"
            )
        if self.fused_head and self.compute_dtype != "float32":
            raise ValueError(
                f"fused_head=true would compute losses in {self.compute_dtype}, with 3 digits: leave it out, or set "
                "compute_dtype=float32"
            )
        return self


def _resume(value: object) -> str | int:
    """Validate checkpoint.resume. pydantic's own check of a union would report an error for each of its types."""
    if value in ("auto", "never") or (type(value) is int and value > 0):
        return value
    raise ValueError("must be auto, never, or the step of a checkpoint")


class CheckpointConfig(Section):
    """When and where checkpoints are written, and how a run resumes."""

    dir: PathText | None = Field(
        None, min_length=1, description="folder of the checkpoints, a path or an fsspec URL; null: run.dir/checkpoints"
    )
    save_every: int = Field(1000, gt=0, description="steps between checkpoints; the last step is always saved")
    keep_last: int = Field(2, gt=0, description="number of newest complete checkpoints that are kept")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints at multiples of this many steps are never removed; null: none"
    )
    keep_best: int | None = Field(
        None,
        gt=0,
        description="number of checkpoints with the lowest validation NELBO (mean over sources) that are kept too; "
        "null: none",
    )
    asynchronous: bool = Field(
        True, description="write in the background; training waits only for a copy to host memory"
    )
    resume: Annotated[Literal["auto", "never"] | int, PlainValidator(_resume)] = Field(
        "auto",
        description="auto: resume from the newest complete checkpoint; a step: go back to the checkpoint of that step, "
        "once; never: refuse a run folder that has a checkpoint",
    )
    allow_changed: tuple[Literal["global_batch", "data", "sequence_length", "phases"], ...] = Field(
        (), description="settings that may differ when resuming; see docs/checkpoints.md"
    )
    init_from: PathText | None = Field(None, description="run or checkpoint whose weights start a new run")
    resize_vocab: bool = Field(
        False,
        description="allow init_from with another vocabulary: embedding and head rows move with their tokens; new "
        "tokens start at the mean of the old rows",
    )
    export_every: int | None = Field(
        None, gt=0, description="steps between exports for transformers (the last step is always exported); null: none"
    )

    @model_validator(mode="after")
    def _falls_on_checkpoints(self) -> "CheckpointConfig":
        for name, every in (("export_every", self.export_every), ("keep_every", self.keep_every)):
            if every is not None and every % self.save_every:
                raise ValueError(f"{name}={every} is not a multiple of save_every={self.save_every}")
        return self


class MonitorConfig(Section):
    """What is recorded and shown while the run trains."""

    log_every: int = Field(10, gt=0, description="steps between progress lines and metric flushes")
    tensorboard: bool = Field(True, description="write RUN/events")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases that mirrors the records (pip install wandb)"
    )
    record_every: int = Field(
        1,
        gt=0,
        description="steps between training records in metrics.jsonl and TensorBoard; a smaller number needs more disk",
    )
    probe_every: int | None = Field(
        100,
        ge=0,
        description="steps between measurements of the loss's variance and of the gradient noise; 0 or null: none",
    )
    probe_sequences: int = Field(
        8, ge=4, multiple_of=2, description="validation sequences in one measurement; an even number"
    )
    probe_rates: int = Field(4, ge=2, description="masking rates for each of these sequences")
    probe_masks: int = Field(2, ge=2, description="masks for each sequence and rate")
    profile_at: int | None = Field(
        None, ge=0, description="step (from 0) at which rank 0 starts a torch.profiler trace; null: none"
    )
    profile_steps: int = Field(3, gt=0, description="steps in the trace, RUN/profile/step-N.json")


class EvalConfig(Section):
    """The validation NELBO that is measured during training."""

    every: int = Field(1000, gt=0, description="steps between evaluations; the last step is always evaluated")
    rows: int = Field(256, gt=0, description="validation sequences per source; all of them if there are fewer")
    samples: int = Field(4, gt=0, description="noise draws (forward passes) per sequence")
    batch: int = Field(32, gt=0, description="sequences per forward pass, the same on any number of ranks")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the evaluation noise")


class Config(Section):
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _best_is_known(self) -> "Config":
        save = self.checkpoint.save_every
        evaluate = self.eval.every
        if self.checkpoint.keep_best is not None and save % evaluate and evaluate % save:
            raise ValueError(
                f"checkpoint.keep_best needs an evaluation at its checkpoints: make eval.every={evaluate} a divisor or "
                f"a multiple of checkpoint.save_every={save}"
            )
        return self

    @model_validator(mode="after")
    def _causal_is_ar(self) -> "Config":
        if bool(self.model.causal) != (self.diffusion.objective == "ar"):
            raise ValueError("model.causal=true and diffusion.objective=ar need each other: set both, or neither")
        return self

    @property
    def slots_per_step(self) -> int:
        """Sequences in a step. With pairs of views, a sequence has two of the rows of the global batch."""
        return self.run.global_batch // self.diffusion.rows_per_slot

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        return step > 0 and (step % self.eval.every == 0 or step == self.run.steps)

    def saves(self, step: int) -> bool:
        """Whether there is a regular checkpoint after `step` steps. The last step and a stop also save."""
        return step % self.checkpoint.save_every == 0

    def to_yaml(self) -> str:
        return yaml12.dump(self.model_dump(mode="json"))


@dataclass(frozen=True)
class RunPlan:
    """The numbers that follow from a configuration and a number of ranks."""

    world_size: int
    rows_per_rank: int  # rows of one step that belong to one rank
    micro_batch: int  # rows in one forward pass
    rows_per_slot: int  # views of one sequence, which are adjacent rows
    accumulation: int  # micro-steps per step
    tokens_per_step: int  # positions, padding included
    reasons: tuple[str, ...]  # one sentence per derived number

    def slots(self, rank: int, micro_step: int) -> range:
        """The slots (sequences) in one micro-batch. Each rank has one contiguous block of the slots of a step."""
        first = (rank * self.rows_per_rank + micro_step * self.micro_batch) // self.rows_per_slot
        return range(first, first + self.micro_batch // self.rows_per_slot)


def resolve(config: Config, world_size: int) -> RunPlan:
    """The plan of `config` on `world_size` ranks.

    Raises ValueError if the rows or the ranks cannot be split evenly, or if the warm-up is too long.
    """
    run = config.run
    views = config.diffusion.rows_per_slot
    if run.global_batch % (world_size * views):
        raise ValueError(
            f"run.global_batch={run.global_batch} does not divide over {world_size} ranks"
            + (f" with {views} rows per sequence" if views > 1 else "")
            + f": make it a multiple of {world_size * views}, or start another number of ranks"
        )
    rows = run.global_batch // world_size
    micro = min(run.micro_batch, rows)
    if rows % micro or micro % views:
        divisors = [d for d in range(views, rows + 1, views) if rows % d == 0]
        raise ValueError(
            f"run.micro_batch={micro} does not divide the {rows} rows of a rank "
            f"(run.global_batch={run.global_batch} / {world_size} ranks): choose one of {divisors}"
        )
    parallel = config.parallel
    shard = parallel.shard or world_size // parallel.replicate
    if parallel.replicate * shard != world_size:
        raise ValueError(
            f"parallel.replicate={parallel.replicate} x parallel.shard={shard} is not {world_size} ranks: "
            "leave parallel.shard out, and choose a parallel.replicate that divides the number of ranks"
        )
    optim = config.optim
    stable = run.steps  # steps before the decay
    if optim.schedule == "wsd":
        stable -= round(run.steps * optim.decay_fraction)
    if optim.warmup_steps > stable:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} does not fit before the decay of a run of {run.steps} steps "
            f"(at most {stable}): lower it, or raise run.steps"
        )
    tokens = run.global_batch * config.data.sequence_length
    plan = f"accumulation {rows // micro} = {run.global_batch} / ({world_size} ranks x {micro})"
    if micro < run.micro_batch:
        plan += f"; micro-batch {micro} instead of {run.micro_batch}: a rank has only {rows} rows"
    size = f"tokens per step {tokens:,} = {run.global_batch} rows x {config.data.sequence_length}"
    total = f"tokens in the run {tokens * run.steps:,} = {run.steps:,} steps x {tokens:,}"
    return RunPlan(world_size, rows, micro, views, rows // micro, tokens, (plan, size, total))


# ---- keys of older versions

RENAMED = {
    "diffusion.grid": ("diffusion.fit_rates", "diffusion.fit_sequences", "diffusion.fit_masks"),
    "monitor.probe": ("monitor.probe_sequences", "monitor.probe_rates", "monitor.probe_masks"),
    "parallel.recompute": ("parallel.activation_checkpointing",),
    "checkpoint.allow": ("checkpoint.allow_changed",),
}


def upgrade(tree: dict) -> dict:
    """A configuration of an older version with today's keys. A list becomes one key for each entry."""
    new = {name: dict(section) for name, section in tree.items()}
    for old, keys in RENAMED.items():
        section, key = old.split(".")
        if key in new.get(section, {}):
            value = new[section].pop(key)
            values = [value] if len(keys) == 1 else value
            new[section] |= {to.split(".")[1]: one for to, one in zip(keys, values, strict=True)}
    return new


# ---- reading


def _field_names(path: tuple) -> list[str]:
    """The valid keys at the level of the last part of a configuration path."""
    level: type[BaseModel] = Config
    for part in path[:-1]:
        if isinstance(part, int):
            continue
        match part:
            case "sources":
                level = DataSource
            case "phases":
                level = DataPhase
            case _:
                level = cast(type[BaseModel], level.model_fields[part].annotation)
    return list(level.model_fields)


def _explain(error: ErrorDetails) -> str:
    """One of pydantic's errors, as a sentence with the key and what to do."""
    path = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            if path in RENAMED:
                return f"unknown key '{path}': it is now {', '.join(RENAMED[path])}"
            names = _field_names(error["loc"])
            close = difflib.get_close_matches(str(error["loc"][-1]), names, n=1, cutoff=0.5)
            meant = ".".join([*path.split(".")[:-1], *close])
            hint = f"did you mean '{meant}'?" if close else f"there are {', '.join(names)}"
            return f"unknown key '{path}': {hint}"
        case "missing":
            return f"'{path}' is missing: give it in a file or as {path}=VALUE"
        case "value_error":  # from our own validators
            return f"'{path}': {error['ctx']['error']}" if path else str(error["ctx"]["error"])
        case _:
            return f"'{path}': {error['msg'][0].lower()}{error['msg'][1:]}, got {json.dumps(error['input'])}"


def validate(tree: dict, where: str) -> Config:
    """The typed configuration of a plain tree. Raises ValueError, one line naming every wrong key."""
    try:
        # JSON, because pydantic then accepts a list for a tuple and stays strict about other types.
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        errors = error.errors()
        # A section with an error inside has an error of its own, which says nothing more.
        outer = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
        raise ValueError(f"{where}: " + "; ".join(_explain(e) for e in errors if e["loc"] not in outer)) from None
    except ValueError as error:
        raise ValueError(f"{where}: cannot be written as JSON: {error}") from None


def load(arguments: list[str]) -> Config:
    """The configuration of a command line: YAML files, then section.key=value overrides.

    Raises ValueError with one line that says what is wrong, where, and what to do.
    """
    tree, files = yaml12.read(arguments)
    return validate(tree, "configuration " + " + ".join(files))
