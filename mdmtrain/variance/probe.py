"""Forward passes on a grid of sequences x rates x masks: variance components during training, and the fit of p.

Both use their own random streams, so they do not change the noise or the data order of training.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import Config
from mdmtrain.data.loader import Rows, random_rows
from mdmtrain.data.shards import PreparedSplit
from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.noise import Stream
from mdmtrain.diffusion.objective import ForwardProcess, MaskedBatch, MaskingRates, row_losses, row_statistics
from mdmtrain.diffusion.rates import Density
from mdmtrain.diffusion.sampler import fit_density
from mdmtrain.model.transformer import Transformer, masked_cross_entropy
from mdmtrain.monitor.metrics import finite
from mdmtrain.parallel.forward_passes import deal
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World
from mdmtrain.variance.components import loss_components, paired_rates


class Probe:
    """Measures a model with forward passes only. `decompose` and `fit` are collectives."""

    def __init__(self, model: Transformer, config: Config, mask_id: int, world: World):
        self._model = model
        self._config = config
        self._mask_id = mask_id
        self._world = world
        self._since = time.monotonic()

    def decompose(
        self, process: ForwardProcess, validation: list[PreparedSplit], step: int, watch: Watchdog | None = None
    ) -> tuple[dict[str, float | None], float, float]:
        """The variance components A, B_t, B_int and C of one slot's loss, on randomly drawn validation rows.

        Returns (components, seconds, share): the components in squared nats per token, None where not finite; the
        seconds that the probe took; and their share of the time since the previous probe. The loss is that of the
        forward process with its sampler, masks, views and weights: y = sum_i weight_i CE_i / L, averaged over the
        views. Strata are not used, because they relate the slots of a step and this is the loss of one slot. watch:
        the watchdog of a run in training. With it, a stop request raises Interrupted.
        """
        start = time.monotonic()
        monitor = self._config.monitor
        sequences = monitor.probe_sequences
        rates = monitor.probe_rates
        masks = monitor.probe_masks
        bits = noise.philox(self._config.run.seed, Stream.PROBE, 2 * step)
        rows = random_rows(validation, self._config.data, sequences, bits)
        draws = paired_rates(process, sequences, rates, bits)
        values = self._grid(process, rows, draws, masks, Stream.PROBE, 2 * step + 1, row_losses, watch)
        parts = loss_components(values.mean(axis=3) / self._config.data.sequence_length)
        before = self._since
        self._since = time.monotonic()
        seconds = self._since - start
        found = {name: finite(float(value)) for name, value in parts.items()}
        return found, seconds, seconds / (self._since - before)

    def fit(self, process: ForwardProcess, sources: list[PreparedSplit]) -> Density:
        """The P-POTS density for the present weights, from forward passes only (arXiv 2511.18159).

        process: a process with uniform rates; its configuration says what is fitted. The fit uses fit_rates x
        fit_sequences x fit_masks forward passes on training rows. The rates are stratified over all rates and
        sequences together, so that each bin gets its share of them and the mean statistic of a bin is unbiased.
        """
        seed = self._config.run.seed
        diffusion = process.config
        rates = diffusion.fit_rates
        sequences = diffusion.fit_sequences
        masks = diffusion.fit_masks
        rows = random_rows(sources, self._config.data, sequences, noise.philox(seed, Stream.FIT, 0))
        draws = process.rates_at(strata.uniforms(seed, 1, sequences * rates, "global", Stream.FIT))
        statistics = self._grid(
            process, rows, draws, masks, Stream.FIT, 2, lambda ce, c: row_statistics(ce, c, diffusion.target)
        )
        cells = process.row_cells(draws).reshape(sequences, rates, 1, -1)
        cells = np.broadcast_to(cells, statistics.shape).flatten()
        sums = np.bincount(cells, statistics.flatten(), diffusion.bins)
        counts = np.bincount(cells, minlength=diffusion.bins)
        return fit_density(process, sums, counts)

    def _grid(
        self, process: ForwardProcess, rows: Rows, draws: MaskingRates, masks: int, stream: Stream, step: int,
        value: Callable[[Tensor, MaskedBatch], Tensor], watch: Watchdog | None = None,
    ) -> np.ndarray:  # fmt: skip
        """`value` for every (sequence, rate, mask, view): float64 [a, b, masks, views].

        rows: a rows. draws: a * b rates, grouped by sequence. stream, step: determine the noise of the positions.
        Batches of eval.batch slots are formed by global index, so the result does not depend on the number of ranks.
        """
        ids, eligible, segments = rows
        count = len(draws.rates) * masks
        length = ids.shape[1]
        views = process.config.rows_per_slot

        def values(slots: np.ndarray) -> Tensor:
            row = torch.from_numpy(slots // (count // len(ids)))
            uniforms = torch.from_numpy(noise.position_uniforms(self._config.run.seed, step, slots, length, stream))
            drawn = draws.at(slots // masks)
            masked_batch = process.corrupt(ids[row], eligible[row], uniforms, drawn, self._mask_id).to(
                self._world.device
            )
            visible = None if segments is None else segments[row]
            ce = masked_cross_entropy(self._model, masked_batch, visible, views)
            return value(ce, masked_batch)

        dealt = deal(count, self._config.eval.batch, values, self._model, self._world, watch)
        return dealt.reshape(len(ids), -1, masks, views)
