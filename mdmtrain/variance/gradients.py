"""Measure the noise of a step's gradient under each arm, with the user's model and data, at equal compute.

A step of N rows sums n slots (a pair of views is one slot). Given the strata of their rates, slots are independent, to
the extent that rows of one shuffled epoch are. Let H be the gradient of a slot and H' that of another slot of the same
stratum. Then

    Tr Cov(step) = n/N^2 E[|H|^2 - <H, H'>]        (strata none: one stratum of all rates; mathematics.md section 2)

|H|^2 has a heavy tail from rows with a single masked token at a rate near eps. <H, H'> is small and has no such tail.
So slots are drawn from a proposal density r, which prefers the important rates, and are weighted by p/r. This is
unbiased, and the arms can share data, noise, rates and most gradients. Pairs of real training steps g, g' are the
reference: |g - g'|^2 / 2 has the same mean.
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
    row_losses,
)
from mdmtrain.diffusion.rates import Density, fit
from mdmtrain.diffusion.sampler import token_table
from mdmtrain.model.transformer import Transformer, masked_cross_entropy
from mdmtrain.muon import local, local_gradient
from mdmtrain.parallel.world import World
from mdmtrain.variance.probe import Probe

# Step numbers beyond those of any run, so that data order and noise differ from those of training.
FIRST_STEP = 1 << 40
SLOT_STEP = 3 << 40
ROW_STEP = 4 << 40
FIT = {"fit_rates": 32, "fit_sequences": 200, "fit_masks": 1}  # the forward passes that fit p to the checkpoint
PARTNERED = 0.5  # share of slots for which <H, H'> is measured too; it is a small part of the sum
Progress = Callable[[], None]
Slot = tuple[Tensor, float]  # this rank's part of a slot's gradient, and its loss


@dataclass(frozen=True)
class ArmNoise:
    """The noise of one arm's steps: independent values whose means estimate the quantities."""

    gradient: np.ndarray  # float64 [values], mean: Tr Cov of the step gradient
    loss: np.ndarray  # float64 [values], mean: variance of the step loss


@dataclass(frozen=True)
class SlotNoise(ArmNoise):
    """The same from single slots, with the values that `intervals.density_floor` needs."""

    rate: np.ndarray  # float64 [values], masking rate of the slot
    weight: np.ndarray  # float64 [values], the arm's density at that rate over the proposal density
    square: np.ndarray  # float64 [values], |H|^2 without weights


class Bench:
    """Runs any arm on a model. Every public method is a collective."""

    def __init__(
        self, model: Transformer, config: Config, sources: list[PreparedSplit], tokenizer: Tokenizer, world: World
    ):
        """config: the configuration of the run, with the global batch and the micro-batch of a step."""
        self.model = model
        self.config = config
        self.sources = sources
        self.world = world
        self.mask_id = tokenizer.mask_id
        self._pieces = tokenizer.pieces()
        self._probe = Probe(model, config, tokenizer.mask_id, world)
        self.densities: dict[DiffusionConfig, Density] = {}  # see `fitted_settings`
        self._nothing = torch.cat([torch.zeros_like(local(p)).flatten() for p in model.parameters()])

    def step_noise(self, diffusion: DiffusionConfig, pairs: int, on_step: Progress) -> tuple[ArmNoise, np.ndarray]:
        """The reference from 2 * pairs real steps: half the squared difference of each pair, and its <g, g'>.

        <g, g'> is float64 [pairs], with mean |E g|^2. Step s reads the same data in all arms with the same number of
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
        """The noise of each arm's steps by the formula above, from `slots` single slots with one value each.

        In all arms, values of equal index share data, position noise and (for equal rate ranges) rates. So ratios of
        arms have less noise than the values. The schedule is linear.
        """
        seed = self.config.run.seed
        rows = self.config.run.global_batch
        dataset = self._dataset(DiffusionConfig())
        processes = {name: self._process(arm) for name, arm in arms.items()}
        about = {name: (self._proposal(process), self._centre(process)) for name, process in processes.items()}
        first = strata.uniforms(seed, SLOT_STEP, slots, "global")
        # These are not stratified, because the index of a stratified slot says in which half its uniform number is.
        second, chance = (strata.uniforms(seed, SLOT_STEP + k, slots, "none") for k in (1, 2))
        values: dict[str, list] = {name: [] for name in arms}
        for index in range(slots):
            batch = dataset.__getitems__([(SLOT_STEP + index, 0), (SLOT_STEP + index, 1)])
            known: tuple[list, list] = [], []
            for name, process in processes.items():
                proposal, centre = about[name]
                per_step = rows // process.config.rows_per_slot
                t, weight = _drawn(process, proposal, first[index])
                slot = self._slot(process, _row(batch, 0, 0), t, known[0])
                square = self._moments(slot, slot, centre)
                value = weight * square
                if chance[index] < PARTNERED:
                    # Another rate of the same stratum as t, drawn from the proposal within the stratum.
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
        """Single rows under independent, uniform rates: {"gradient" | "loss": {kind: float64 [rows]}}, for one row.

        Each value is |H|^2 - <H, H'>. Its mean is that of half the squared difference of two rows. The kind says what
        the two rows share: A (row and rate, with different masks), AB (the row), AC (the rate: A + B_int + C), ABC
        (nothing), mirror (they are the two views of a MIRROR pair: A (1 - rho)).
        """
        plain = DiffusionConfig(eps=self.config.diffusion.eps, strata="none")
        process = plain_process(plain)
        pair_process = plain_process(plain.model_copy(update={"views": "mirror"}))
        seed = self.config.run.seed
        dataset = self._dataset(plain)
        proposal = self._proposal(process)
        centre = self._centre(process)
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
        plan = resolve(config, self.world.size)
        dataset = self._dataset(process.config)
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
        """One slot at the rate t (float64 [1]): gradient and loss per token, of all its views or of view `view`.

        known: earlier slots with the same data. If one has the same masked rows and proportional weights, its gradient
        is scaled instead of computed again. All ranks compute the slot; only rank 0's gradient counts.
        """
        known = [] if known is None else known
        masked_batch = self._corrupt(process, row, MaskingRates(t, process.density.at(t)))
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
        """Add `share` times the gradient of the rows' loss divided by `tokens`. Returns this loss."""
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
        """A constant near the mean loss of a slot, from four separate steps.

        Any constant gives an unbiased result. This one gives little noise.
        """
        return (
            float(np.mean([self._step(process, SLOT_STEP - k)[1] for k in range(1, 5)])) * process.config.rows_per_slot
        )

    def _proposal(self, process: ForwardProcess) -> Density:
        """The proposal density of the rate: three quarters proportional to t^-1.5, one quarter uniform.

        |H|^2 falls as 1/t. At small rates most rows have no mask, so |H|^2 varies most and a slot costs least. With
        complementary views this holds at both ends. With drawn counts, a row has one mask for all t below 1/L.
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
        """The arm's forward process, with its final objective (not annealed). For P-POTS, p is fitted to this model."""
        process = plain_process(diffusion, token_table(diffusion.isad_tokens, self._pieces, "diffusion.isad_tokens"))
        if diffusion.sampler == "uniform":
            return process
        settings = fitted_settings(diffusion)
        if settings not in self.densities:
            self.densities[settings] = self._probe.fit(plain_process(settings), self.sources)
        return replace(process, density=self.densities[settings])


def fitted_settings(diffusion: DiffusionConfig) -> DiffusionConfig:
    """The settings that p is fitted under: those of the arm, with uniform rates. Arms that share them share the fit.

    `Probe.fit` always uses global strata, so arms that differ only in their strata share a fit.
    """
    return diffusion.model_copy(update={"sampler": "uniform", "strata": "global", **FIT})


# ---- slots one by one


def _drawn(process: ForwardProcess, proposal: Density, u: float) -> tuple[np.ndarray, float]:
    """(the proposal's rate at u as float64 [1], its weight p/r)."""
    t, r = proposal.draw(np.array([u]))
    return t, float(process.density.at(t)[0] / r[0])


def _row(batch: Batch, data: int, noise: int) -> Batch:
    """One slot with the data of slot number `data` and the position noise of slot number `noise`."""
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
    """The factor between the weights if both have the same masked rows and proportional weights, else None."""
    if not torch.equal(one.noisy, other.noisy):
        return None
    ratio = one.weights / other.weights
    return float(ratio[0]) if (ratio - ratio[0]).abs().max() <= 1e-5 * ratio[0] else None
