"""How noisy is a step's gradient under each arm: true gradients, the user's model and data, equal compute.

An arm's step is a real one: the same number of rows through the model, drawn by the arm's own law. Two independent
steps g, g' give |g - g'|^2 / 2, whose mean is the trace of the gradient's covariance (VARIANCE.md section 2). The
decomposition takes single rows and differences of two draws that share data, rate, or neither.
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
from mdmtrain.diffusion.objective import Corruption, Draws, Law, plain_law, row_losses, row_statistics
from mdmtrain.diffusion.rates import Density, fit
from mdmtrain.diffusion.sampler import token_table
from mdmtrain.model.transformer import Transformer, masked_cross_entropy
from mdmtrain.parallel.world import World
from mdmtrain.parallel.wrap import reshard

FIRST_STEP = 1 << 40  # far beyond any run: its own data order and its own noise
RESAMPLES = 2000
Progress = Callable[[], None]


@dataclass(frozen=True)
class Spread:
    """A mean with its bootstrap interval (95%)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmNoise:
    """What one arm's steps are like: one number for each pair of steps."""

    gradient: np.ndarray  # float64 [pairs], |g - g'|^2 / 2: their mean is Tr Cov of the step gradient
    loss: np.ndarray  # float64 [pairs], (l - l')^2 / 2: their mean is the variance of the step loss


class Bench:
    """A model in place, and the means to run any arm on it. Every method is a collective."""

    def __init__(
        self, model: Transformer, config: Config, sources: list[PreparedSplit], tokenizer: Tokenizer, world: World
    ):
        """config: the run's; its global batch and micro-batch say how large a step is."""
        self.model, self.config, self.sources, self.world = model, config, sources, world
        self.mask_id = tokenizer.mask_id
        self._pieces = tokenizer.pieces()
        self.densities: dict[tuple, Density] = {}

    def arm_noise(self, diffusion: DiffusionConfig, pairs: int, on_step: Progress) -> ArmNoise:
        """The noise of 2 * pairs steps of an arm. Step s reads the same data in every arm with as many sequences."""
        law = self._law(diffusion)
        gradients, losses = [], []
        previous: tuple[Tensor, float] | None = None
        for step in range(2 * pairs):
            gradient, loss = self._step(diffusion, law, FIRST_STEP + step)
            on_step()
            if previous is None:
                previous = gradient, loss
                continue
            gradients.append(self._square(gradient - previous[0]) / 2)
            losses.append((loss - previous[1]) ** 2 / 2)
            previous = None
        return ArmNoise(np.array(gradients), np.array(losses))

    def decompose(self, rows: int, on_step: Progress) -> dict[str, dict[str, np.ndarray]]:
        """Single-row differences under independent, uniform rates: {"gradient" | "loss": {kind: float64 [rows]}}.

        kinds: A (same row and rate, other mask), AB (same row), AC (same rate, other row: A + B_int + C), ABC (all
        other), mirror (the two views of one MIRROR pair: A (1 - rho)). Means are the quantities, in units of one row.
        """
        plain = DiffusionConfig(eps=self.config.diffusion.eps, strata="none")
        mirror = plain.model_copy(update={"views": "mirror"})
        law, pair_law = plain_law(plain), plain_law(mirror)
        dataset = self._dataset(plain)
        kinds: dict[str, dict[str, list[float]]] = {"gradient": {}, "loss": {}}
        for row in range(rows):
            batch = dataset.__getitems__([(FIRST_STEP + row, slot) for slot in range(4)])
            draws = law.draw(self.config.run.seed, FIRST_STEP + row, 2)
            t, other_t = draws.at(np.array([0])), draws.at(np.array([1]))
            base = self._single(law, batch, 0, 0, t)
            others = {
                "A": self._single(law, batch, 0, 1, t),
                "AB": self._single(law, batch, 0, 2, other_t),
                "AC": self._single(law, batch, 1, 3, t),
                "ABC": self._single(law, batch, 2, 1, other_t),
                "mirror": self._single(pair_law, batch, 0, 0, t, view=1),
            }
            for kind, (gradient, loss) in others.items():
                kinds["gradient"].setdefault(kind, []).append(self._square(gradient - base[0]) / 2)
                kinds["loss"].setdefault(kind, []).append((loss - base[1]) ** 2 / 2)
            on_step()
        return {what: {kind: np.array(values) for kind, values in of.items()} for what, of in kinds.items()}

    # ---- steps

    def _step(self, diffusion: DiffusionConfig, law: Law, step: int) -> tuple[Tensor, float]:
        """(this rank's part of the gradient, the loss) of one whole step."""
        config = self.config.model_copy(update={"diffusion": diffusion})
        plan, dataset = resolve(config, self.world.size), self._dataset(diffusion)
        draws = law.draw(config.run.seed, step, config.slots_per_step, self.world.size)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro_step in range(plan.accumulation):
            batch = dataset.__getitems__([(step, slot) for slot in plan.slots(self.world.rank, micro_step)])
            corruption = law.corrupt(
                batch.ids, batch.eligible, batch.uniforms, draws.at(batch.slots.numpy()), self.mask_id
            ).to(self.world.device)
            loss = row_losses(
                masked_cross_entropy(self.model, corruption, batch.segments, plan.rows_per_slot), corruption
            ).sum()
            (loss / plan.tokens_per_step).backward()
            total += loss.detach().double() / plan.tokens_per_step
        return self._take_gradient(), float(self.world.sum(total))

    def _single(self, law: Law, batch: Batch, data: int, noise: int, t: Draws, view: int = 0) -> tuple[Tensor, float]:
        """One row: the data of one slot, the positions' noise of another, a given rate. Rank 0's row counts."""
        corruption = law.corrupt(
            batch.ids[data : data + 1],
            batch.eligible[data : data + 1],
            batch.uniforms[noise : noise + 1],
            t,
            self.mask_id,
        )
        length, rows = corruption.noisy.shape[1], corruption.noisy.shape[0]
        keep = corruption.positions // length == view
        one = Corruption(
            corruption.noisy[view : view + 1], corruption.positions[keep] - view * length, corruption.targets[keep],
            corruption.weights[keep], corruption.unit[keep],
        ).to(self.world.device)  # fmt: skip
        assert rows > view
        segments = None if batch.segments is None else batch.segments[data : data + 1]
        loss = row_losses(masked_cross_entropy(self.model, one, segments, 1), one).sum() / length
        (loss * (1.0 if self.world.is_main else 0.0)).backward()
        return self._take_gradient(), float(loss.detach())

    def _take_gradient(self) -> Tensor:
        parts = [p.grad.to_local().flatten() for p in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(parts)

    def _square(self, difference: Tensor) -> float:
        return float(self.world.sum(difference.double().square().sum()))

    def _dataset(self, diffusion: DiffusionConfig) -> Dataset:
        return Dataset(self.config.model_copy(update={"diffusion": diffusion}), self.sources)

    # ---- samplers

    def _law(self, diffusion: DiffusionConfig) -> Law:
        """The arm's law with the objective as named (not annealed) and, for P-POTS, a density fitted to this model."""
        law = plain_law(diffusion, token_table(diffusion.isad_tokens, self._pieces, "diffusion.isad_tokens"))
        if diffusion.sampler == "uniform":
            return law
        key = (diffusion.masks, diffusion.views == "complement", diffusion.target)
        if key not in self.densities:
            self.densities[key] = self._fit(diffusion)
        return replace(law, density=self.densities[key])

    @torch.no_grad()
    def _fit(self, diffusion: DiffusionConfig, steps: int = 200) -> Density:
        """P-POTS from the statistics of `steps` forward passes at this checkpoint, on data and noise of their own."""
        uniform = diffusion.model_copy(update={"sampler": "uniform"})
        law, dataset = plain_law(uniform), self._dataset(uniform)
        config = self.config.model_copy(update={"diffusion": uniform})
        plan = resolve(config, self.world.size)
        sums = torch.zeros(2, diffusion.bins, dtype=torch.float64)
        for step in range(2 * FIRST_STEP, 2 * FIRST_STEP + steps):
            draws = law.draw(config.run.seed, step, config.slots_per_step, self.world.size)
            for micro_step in range(plan.accumulation):
                batch = dataset.__getitems__([(step, slot) for slot in plan.slots(self.world.rank, micro_step)])
                drawn = draws.at(batch.slots.numpy())
                corruption = law.corrupt(batch.ids, batch.eligible, batch.uniforms, drawn, self.mask_id)
                corruption = corruption.to(self.world.device)
                ce = masked_cross_entropy(self.model, corruption, batch.segments, plan.rows_per_slot)
                statistic = row_statistics(ce, corruption, diffusion.target).double().cpu()
                cells = torch.from_numpy(law.row_cells(drawn))
                sums[0].index_add_(0, cells, statistic)
                sums[1].index_add_(0, cells, torch.ones_like(statistic))
        reshard(self.model)
        totals = [sum(part) for part in zip(*self.world.gather((sums[0].numpy(), sums[1].numpy())), strict=True)]
        edges = law.density.edges
        omega = law.omega((edges[:-1] + edges[1:]) / 2)
        return fit(edges, totals[0] / np.maximum(totals[1], 1), omega, diffusion.floor, diffusion.form)


# ---- from numbers to statements


def mean_interval(values: np.ndarray, seed: int = 0) -> Spread:
    """Mean of independent values with its bootstrap interval."""
    means = values[_resamples(len(values), seed)].mean(axis=1)
    return Spread(float(values.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975])))


def ratio_interval(values: np.ndarray, reference: np.ndarray, seed: int = 0) -> Spread:
    """Ratio of two means. Values of equal index share their data, so both are resampled together."""
    count = min(len(values), len(reference))
    chosen = _resamples(count, seed)
    ratios = values[:count][chosen].mean(axis=1) / reference[:count][chosen].mean(axis=1)
    value = float(values[:count].mean() / reference[:count].mean())
    return Spread(value, *(float(q) for q in np.quantile(ratios, [0.025, 0.975])))


def components(kinds: dict[str, np.ndarray], seed: int = 0) -> dict[str, Spread]:
    """A, B, B_t, B_int + C, C, rho and `mirror_margin` = -rho A - (B_int + C), each with its bootstrap interval."""

    def named(mean: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rest = mean["AC"] - mean["A"]
        return {
            "A": mean["A"],
            "B": mean["AB"] - mean["A"],
            "B_t": mean["ABC"] - mean["AC"],
            "B_int_plus_C": rest,
            "C": mean["ABC"] - mean["AB"],
            "rho": 1 - mean["mirror"] / mean["A"],
            "mirror_margin": mean["mirror"] - mean["A"] - rest,
        }

    chosen = _resamples(len(kinds["A"]), seed)
    value = named({kind: values.mean() for kind, values in kinds.items()})
    spread = named({kind: values[chosen].mean(axis=1) for kind, values in kinds.items()})
    return {
        name: Spread(float(value[name]), *(float(q) for q in np.quantile(spread[name], [0.025, 0.975])))
        for name in value
    }


def _resamples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
