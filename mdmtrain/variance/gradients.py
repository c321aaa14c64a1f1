"""How noisy is a step's gradient under each arm: true gradients, the user's model and data, equal compute.

A step of N rows sums n slots (a pair of views is one slot). Given the strata of their rates, slots are independent, as
far as rows of one shuffled epoch are, so with H a slot's gradient and H' that of another slot of the same stratum

    Tr Cov(step) = n/N^2 E[|H|^2 - <H, H'>]        (strata none: one stratum of all rates; mathematics.md section 2)

|H|^2 has a heavy tail, of a lone masked token at a rate near eps; <H, H'> is small and has none. So slots are drawn at
the rates that matter, by a proposal r, and weighed by p/r: unbiased, and the arms share data, noise, rates, and most
gradients. Real steps g, g', as a trainer takes them, are the reference: |g - g'|^2 / 2 has the same mean.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import Config, DiffusionConfig, resolve
from mdmtrain.data.loader import Batch, Dataset
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.diffusion import strata
from mdmtrain.diffusion.objective import (
    ForwardProcess,
    MaskedBatch,
    MaskingRates,
    plain_process,
    rate_range,
    row_losses,
)
from mdmtrain.diffusion.rates import Density, fit
from mdmtrain.diffusion.sampler import token_table
from mdmtrain.model.transformer import Transformer, masked_cross_entropy
from mdmtrain.muon import local, local_gradient
from mdmtrain.parallel.world import World
from mdmtrain.variance.probe import Probe

# Far beyond any run, so that each has its own data order and its own noise.
FIRST_STEP = 1 << 40
SLOT_STEP = 3 << 40
ROW_STEP = 4 << 40
FIT = {"fit_rates": 32, "fit_sequences": 200, "fit_masks": 1}  # forward passes in which p is fitted to the checkpoint
PARTNERED = 0.5  # share of the slots that are paired with another one: <H, H'> is a small part of the whole
Progress = Callable[[], None]
Slot = tuple[Tensor, float]  # this rank's part of a slot's gradient, and its loss


@dataclass(frozen=True)
class ArmNoise:
    """What one arm's steps are like: independent values whose means are the quantities."""

    gradient: np.ndarray  # float64 [values], mean: Tr Cov of the step gradient
    loss: np.ndarray  # float64 [values], mean: variance of the step loss


@dataclass(frozen=True)
class SlotNoise(ArmNoise):
    """The same from single slots, with what says how much a better density of the rate could still remove."""

    rate: np.ndarray  # float64 [values], masking rate of the slot
    weight: np.ndarray  # float64 [values], the arm's density of that rate over the density it was drawn with
    square: np.ndarray  # float64 [values], |H|^2 without weights


class Bench:
    """A model in place, and the means to run any arm on it. Every method is a collective."""

    def __init__(
        self, model: Transformer, config: Config, sources: list[PreparedSplit], tokenizer: Tokenizer, world: World
    ):
        """config: the run's; its global batch and micro-batch say how large a step is."""
        self.model, self.config, self.sources, self.world = model, config, sources, world
        self.mask_id = tokenizer.mask_id
        self._pieces = tokenizer.pieces()
        self._probe = Probe(model, config, tokenizer.mask_id, world)
        self.densities: dict[tuple, Density] = {}
        self._nothing = torch.cat([torch.zeros_like(local(p)).flatten() for p in model.parameters()])

    def step_noise(self, diffusion: DiffusionConfig, pairs: int, on_step: Progress) -> tuple[ArmNoise, np.ndarray]:
        """The reference, from 2 * pairs real steps: half the squared difference of each pair, and its <g, g'>.

        The mean of the latter (float64 [pairs]) is |E g|^2. Step s reads the same data in every arm with as many
        sequences.
        """
        process = self._process(diffusion)
        gradients, losses, products = [], [], []
        for step in range(FIRST_STEP, FIRST_STEP + 2 * pairs, 2):
            (g, loss), (other, other_loss) = (self._step(process, s, on_step) for s in (step, step + 1))
            gradients.append(self._inner(g - other, g - other) / 2)
            losses.append((loss - other_loss) ** 2 / 2)
            products.append(self._inner(g, other))
        return ArmNoise(np.array(gradients), np.array(losses)), np.array(products)

    def slot_noise(self, arms: dict[str, DiffusionConfig], slots: int, on_slot: Progress) -> dict[str, SlotNoise]:
        """The noise of each arm's steps from `slots` single slots, one value each, by the formula above.

        Values of equal index share data, positions' noise and (given the range) rates over all arms, whose ratios are
        therefore sharper than their values. Schedule linear.
        """
        seed, rows, dataset = self.config.run.seed, self.config.run.global_batch, self._dataset(DiffusionConfig())
        processes = {name: self._process(arm) for name, arm in arms.items()}
        about = {name: (self._proposal(process), self._centre(process)) for name, process in processes.items()}
        first = strata.uniforms(seed, SLOT_STEP, slots, "global")
        # Independent: the index of a stratified slot says in which half its uniform lies.
        second, chance = (strata.uniforms(seed, SLOT_STEP + k, slots, "none") for k in (1, 2))
        values: dict[str, list] = {name: [] for name in arms}
        for index in range(slots):
            batch = dataset.__getitems__([(SLOT_STEP + index, 0), (SLOT_STEP + index, 1)])
            known: tuple[list, list] = [], []
            for name, process in processes.items():
                (proposal, centre), per_step = about[name], rows // process.config.rows_per_slot
                t, weight = _drawn(process, proposal, first[index])
                slot = self._slot(process, _row(batch, 0, 0), t, known[0])
                square = self._moments(slot, slot, centre)
                value = weight * square
                if chance[index] < PARTNERED:
                    # Another rate of the stratum that t lies in, of the proposal within it.
                    parts = {"none": 1, "global": per_step, "rank": per_step // self.world.size}[process.config.strata]
                    stratum = min(int(process.density.cdf(t)[0] * parts), parts - 1)
                    low, high = proposal.cdf(process.density.draw(np.array([stratum, stratum + 1]) / parts)[0])
                    other, other_weight = _drawn(process, proposal, low + (high - low) * second[index])
                    partner = self._slot(process, _row(batch, 1, 1), other, known[1])
                    joint = weight * other_weight * (high - low) * parts
                    value = value - joint / PARTNERED * self._moments(slot, partner, centre)
                values[name].append([*value * per_step / rows**2, t[0], weight, square[0]])
            on_slot()
        return {name: SlotNoise(*np.array(of).T) for name, of in values.items()}

    def decompose(self, rows: int, on_row: Progress) -> dict[str, dict[str, np.ndarray]]:
        """Single rows under independent, uniform rates: {"gradient" | "loss": {kind: float64 [rows]}}.

        |H|^2 - <H, H'> has the mean of half the squared difference of two rows that share what the kind says: A (same
        row and rate, other mask), AB (same row), AC (same rate, other row: A + B_int + C), ABC (nothing), mirror (the
        two views of one MIRROR pair: A (1 - rho)). In units of one row.
        """
        plain = DiffusionConfig(eps=self.config.diffusion.eps, strata="none")
        process, pair_process = plain_process(plain), plain_process(plain.model_copy(update={"views": "mirror"}))
        seed, dataset, proposal, centre = (
            self.config.run.seed,
            self._dataset(plain),
            self._proposal(process),
            self._centre(process),
        )
        first, second = (strata.uniforms(seed, ROW_STEP + k, rows, how) for k, how in enumerate(("global", "none")))
        kinds: dict[str, list] = {}
        for row in range(rows):
            batch = dataset.__getitems__([(ROW_STEP + row, slot) for slot in range(4)])
            (t, weight), (other, other_weight) = (_drawn(process, proposal, u[row]) for u in (first, second))
            base = self._slot(process, _row(batch, 0, 0), t)
            joint = weight * other_weight
            partners = {
                "A": (weight, self._slot(process, _row(batch, 0, 1), t)),
                "AB": (joint, self._slot(process, _row(batch, 0, 2), other)),
                "AC": (weight, self._slot(process, _row(batch, 1, 3), t)),
                "ABC": (joint, self._slot(process, _row(batch, 2, 1), other)),
                "mirror": (weight, self._slot(pair_process, _row(batch, 0, 0), t, view=1)),
            }
            square = weight * self._moments(base, base, centre)
            for kind, (share, partner) in partners.items():
                kinds.setdefault(kind, []).append(square - share * self._moments(base, partner, centre))
            on_row()
        both = {kind: np.array(values).T for kind, values in kinds.items()}
        return {what: {kind: of[k] for kind, of in both.items()} for k, what in enumerate(("gradient", "loss"))}

    # ---- steps and slots

    def _step(self, process: ForwardProcess, step: int, on_step: Progress = lambda: None) -> Slot:
        """(this rank's part of the gradient, the loss) of one whole step."""
        config = self.config.model_copy(update={"diffusion": process.config})
        plan, dataset = resolve(config, self.world.size), self._dataset(process.config)
        draws = process.draw(config.run.seed, step, config.slots_per_step, self.world.size)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro_step in range(plan.accumulation):
            batch = dataset.__getitems__([(step, slot) for slot in plan.slots(self.world.rank, micro_step)])
            masked_batch = self._corrupt(process, batch, draws.at(batch.slots.numpy()))
            total += self._backward(masked_batch, batch.segments, plan.rows_per_slot, plan.tokens_per_step).double()
        on_step()
        return self._take_gradient(), float(self.world.sum(total))

    def _slot(
        self, process: ForwardProcess, row: Batch, t: np.ndarray, known: list | None = None, view: int | None = None
    ) -> Slot:
        """One slot at a rate (float64 [1]): gradient and loss per token of its views together, or of one of them.

        known: slots of the same data so far; the same masked rows with weights in proportion are not run again. Every
        rank runs the slot, rank 0's counts.
        """
        known, masked_batch = (
            [] if known is None else known,
            self._corrupt(process, row, MaskingRates(t, process.density.at(t))),
        )
        if view is not None:
            masked_batch = _one_view(masked_batch, view)
        if len(masked_batch.positions) == 0:
            return self._nothing, 0.0
        for other, (gradient, loss) in known:
            if (scale := _proportion(masked_batch, other)) is not None:
                return gradient * scale, loss * scale
        views, length = masked_batch.noisy.shape
        loss = float(self._backward(masked_batch, row.segments, views, length, 1.0 if self.world.is_main else 0.0))
        known.append((masked_batch, (self._take_gradient(), loss)))
        return known[-1][1]

    def _backward(
        self, masked_batch: MaskedBatch, segments: Tensor | None, views: int, tokens: int, share: float = 1.0
    ) -> Tensor:
        """Add share times the gradient of the rows' loss per token of `tokens`; returns that loss."""
        ce = masked_cross_entropy(self.model, masked_batch, segments, views)
        loss = row_losses(ce, masked_batch).sum() / tokens
        (share * loss).backward()
        return loss.detach()

    def _corrupt(self, process: ForwardProcess, batch: Batch, draws: MaskingRates) -> MaskedBatch:
        masked_batch = process.corrupt(batch.ids, batch.eligible, batch.uniforms, draws, self.mask_id)
        return masked_batch.to(self.world.device)

    def _take_gradient(self) -> Tensor:
        parts = [local_gradient(p).flatten() for p in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(parts)

    def _inner(self, one: Tensor, other: Tensor) -> float:
        return float(self.world.sum((one * other).sum(dtype=torch.float64)))

    def _moments(self, one: Slot, other: Slot, centre: float) -> np.ndarray:
        """(<H, H'>, (l - centre) (l' - centre)): float64 [2]."""
        return np.array([self._inner(one[0], other[0]), (one[1] - centre) * (other[1] - centre)])

    def _centre(self, process: ForwardProcess) -> float:
        """A constant near a slot's mean loss, from steps of its own: any is right, this one leaves little noise."""
        return (
            float(np.mean([self._step(process, SLOT_STEP - k)[1] for k in range(1, 5)])) * process.config.rows_per_slot
        )

    def _proposal(self, process: ForwardProcess) -> Density:
        """Where to look: three quarters by t^-1.5, the rest uniform.

        |H|^2 falls as 1/t and varies most, and costs least, where rows mostly have no mask; for complements at both
        ends. Drawn counts have one mask all the way from t = 1/L down.
        """
        low, high = process.density.edges[[0, -1]]
        steps = np.geomspace(1e-3, 0.5, 48)
        edges = low + (high - low) * np.concatenate([[0.0], steps, 1 - steps[-2::-1], [1.0]])
        near = (edges[:-1] + edges[1:]) / 2
        if process.config.views == "complement":
            near = np.minimum(near, 1 - near)
        if process.config.masks == "counted":
            near = np.maximum(near, 1 / self.config.data.sequence_length)
        return fit(edges, near**-3.0, np.ones_like(near), 0.25, "histogram")

    def _dataset(self, diffusion: DiffusionConfig) -> Dataset:
        return Dataset(self.config.model_copy(update={"diffusion": diffusion}), self.sources)

    # ---- samplers

    def _process(self, diffusion: DiffusionConfig) -> ForwardProcess:
        """The arm's forward process: the objective as named (not annealed); for P-POTS, p fitted to this model."""
        process = plain_process(diffusion, token_table(diffusion.isad_tokens, self._pieces, "diffusion.isad_tokens"))
        if diffusion.sampler == "uniform":
            return process
        key = (diffusion.masks, rate_range(diffusion), diffusion.target, diffusion.form, diffusion.objective)
        if key not in self.densities:
            uniform = plain_process(diffusion.model_copy(update={"sampler": "uniform", **FIT}))
            self.densities[key] = self._probe.fit(uniform, self.sources)
        return replace(process, density=self.densities[key])


# ---- slots one by one


def _drawn(process: ForwardProcess, proposal: Density, u: float) -> tuple[np.ndarray, float]:
    """(the proposal's rate at u: float64 [1], its weight p/r)."""
    t, r = proposal.draw(np.array([u]))
    return t, float(process.density.at(t)[0] / r[0])


def _row(batch: Batch, data: int, noise: int) -> Batch:
    """One slot: the data of one, the positions' noise of another."""
    at = slice(data, data + 1)
    segments = None if batch.segments is None else batch.segments[at]
    uniforms = batch.uniforms[noise : noise + 1]
    return batch._replace(ids=batch.ids[at], eligible=batch.eligible[at], segments=segments, uniforms=uniforms)


def _one_view(pair: MaskedBatch, view: int) -> MaskedBatch:
    length = pair.noisy.shape[1]
    keep = pair.positions // length == view
    return MaskedBatch(
        pair.noisy[view : view + 1], pair.positions[keep] - view * length, pair.targets[keep], pair.weights[keep],
        pair.unit[keep],
    )  # fmt: skip


def _proportion(one: MaskedBatch, other: MaskedBatch) -> float | None:
    """One factor between all weights of the same masked rows, or None."""
    if not torch.equal(one.noisy, other.noisy):
        return None
    ratio = one.weights / other.weights
    return float(ratio[0]) if (ratio - ratio[0]).abs().max() <= 1e-5 * ratio[0] else None
