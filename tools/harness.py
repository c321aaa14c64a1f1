#!/usr/bin/env python
"""lm-evaluation-harness over a checkpoint: likelihoods are NELBO bounds, texts come from the masked sampler.

Needs the harness itself (pip install 'mdmtrain[harness]'); all of its own options work. Examples:
  tools/harness.py --model mdmtrain --model_args path=runs/NAME,mc_num=128 --tasks arc_easy,hellaswag
  tools/harness.py --model mdmtrain --model_args path=runs/NAME,gen_length=256,block_length=32,steps=256 --tasks gsm8k

Arguments of --model_args: path, weights, mc_num, estimator, batch, seed, check_greedy; gen_length, steps, block_length,
cfg_scale, remasking. One process.
"""

import sys
from collections.abc import Sequence
from typing import Protocol

import torch

from mdmtrain.checkpoint.loading import load_model
from mdmtrain.command import user_errors
from mdmtrain.data.text import continuation_rows, encode_pair
from mdmtrain.generate import fill, never_chosen
from mdmtrain.likelihood import ESTIMATORS, Estimator, estimate
from mdmtrain.monitor.logs import log
from mdmtrain.parallel.world import init_world
from mdmtrain.unmask import Sampling, unmask

Pair = tuple[list[int], list[int]]  # tokens that are given, bos first, and tokens that are scored
ROWS_AT_ONCE = 64  # of similar length, so that little is padded


class Request(Protocol):
    """What the harness hands over (lm_eval.api.instance.Instance)."""

    args: tuple


class Adapter:
    """The three requests of lm_eval.api.model.LM, answered by a checkpoint's model. Knows nothing of the harness."""

    def __init__(
        self,
        path: str,
        weights: str | None = None,
        mc_num: int = 128,
        estimator: str = "systematic",
        batch: int | None = None,
        seed: int = 0,
        check_greedy: bool = True,
        gen_length: int = 64,
        steps: int | None = None,
        block_length: int | None = None,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
    ):
        """check_greedy: False answers "not greedy" throughout and saves a forward pass per token of a continuation.

        Raises ValueError for arguments that do not fit.
        """
        if estimator not in ESTIMATORS or remasking not in ("low_confidence", "random"):
            raise ValueError(f"estimator is one of {', '.join(ESTIMATORS)}, remasking low_confidence or random")
        if mc_num < 1:
            raise ValueError(f"mc_num={mc_num} must be at least 1")
        self._sampling = Sampling(
            gen_length, steps or gen_length, block_length or gen_length, 0.0, cfg_scale, remasking, seed
        )
        self._world = init_world()
        self._loaded = load_model(path, weights, self._world)
        if self._loaded.model.shape.causal:
            raise ValueError(f"{path} is a causal model: this adapter is for masked ones")
        self._estimator = Estimator(estimator, mc_num, seed, self._loaded.config.diffusion.eps)
        self._batch, self._check_greedy = batch or self._loaded.config.eval.batch, check_greedy
        self._longest = self._loaded.config.data.sequence_length
        if gen_length >= self._longest:
            raise ValueError(f"gen_length={gen_length} leaves no room for a context in {self._longest} tokens")

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(lower bound on log p(continuation | context) in nats, whether greedy unmasking would give it)."""
        pairs = [self._fit(*encode_pair(self._loaded.tokenizer, *request.args)) for request in requests]
        return [
            (-nats, self._is_greedy(*rows[0]) if self._check_greedy and len(rows) == 1 else False)
            for nats, rows in zip(self._total_nats(pairs), pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """The same of whole texts, bos given, no eos; those longer than the model in pieces that do not see another."""
        texts = [encode_pair(self._loaded.tokenizer, "", request.args[0]) for request in requests]
        return [-nats for nats in self._total_nats([self._pieces(*text) for text in texts])]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """gen_length tokens after each context, cut at the first stop text; the request's max_gen_toks is not used."""
        texts, tokenizer = [], self._loaded.tokenizer
        for number, request in enumerate(requests):
            context, wanted = request.args
            ids, room = tokenizer.encode(context), self._longest - self._sampling.gen_length - 1
            if len(ids) > room:
                log.warning("a context of %d tokens is cut on the left to %d", len(ids), room)
                ids = ids[len(ids) - room :]
            text = fill(self._loaded, [ids, ""], self._sampling, number, self._world).spans[1]
            stops = wanted.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts

    def _fit(self, given: list[int], rest: list[int]) -> list[Pair]:
        """A context that is too long loses its beginning, but for bos; a continuation that is makes several rows."""
        over = len(given) + len(rest) - self._longest
        if over <= 0:
            return [(given, rest)]
        if over >= len(given):
            log.warning(
                "a continuation of %d tokens is scored without its context and in pieces, as it does not fit the "
                "model's %d tokens", len(rest), self._longest,
            )  # fmt: skip
            return self._pieces(given[:1], rest)
        log.warning("a context of %d tokens is cut on the left to %d", len(given), len(given) - over)
        return [(given[:1] + given[1 + over :], rest)]

    def _pieces(self, bos: list[int], ids: list[int]) -> list[Pair]:
        """A long text as rows of the model's length, none of which sees another."""
        most = self._longest - 1
        return [(bos, ids[start : start + most]) for start in range(0, len(ids), most)]

    def _total_nats(self, texts: list[list[Pair]]) -> list[float]:
        """The nats of each text, the sum over its rows."""
        nats = iter(self._nats([row for rows in texts for row in rows]))
        return [sum(next(nats) for _ in rows) for rows in texts]

    def _nats(self, pairs: list[Pair]) -> list[float]:
        nats = [0.0] * len(pairs)  # where there is nothing to predict
        order = sorted((n for n, pair in enumerate(pairs) if pair[1]), key=lambda n: sum(map(len, pairs[n])))
        for start in range(0, len(order), ROWS_AT_ONCE):
            chosen = order[start : start + ROWS_AT_ONCE]
            rows = continuation_rows([pairs[n] for n in chosen], self._loaded.tokenizer.pad_id)
            mask_id = self._loaded.tokenizer.mask_id
            found = estimate(self._loaded.model, rows, self._estimator, self._batch, mask_id, self._world)
            for number, value in zip(chosen, found.nats, strict=True):
                nats[number] = float(value)
        return nats

    def _is_greedy(self, given: list[int], rest: list[int]) -> bool:
        if not rest:
            return True
        mask_id, count = self._loaded.tokenizer.mask_id, len(rest)
        ids = torch.tensor(given + [mask_id] * count, device=self._world.device)
        one_by_one = Sampling(count, count, count)
        return (
            unmask(self._loaded.model, ids, mask_id, never_chosen(self._loaded), one_by_one, 0).tolist() == given + rest
        )


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        if {"-h", "--help"} & set(sys.argv):  # with the harness it shows all of its options
            print(__doc__)
            return
        raise ValueError(f"{error}: the harness is not installed here: pip install 'mdmtrain[harness]'") from None

    @register_model("mdmtrain")
    class Harness(Adapter, LM):
        """max_batch_size and device are what the harness always passes; the model decides both."""

        def __init__(self, batch_size=None, max_batch_size=None, device=None, **arguments):
            LM.__init__(self)
            Adapter.__init__(self, **arguments)

        @property
        def tokenizer_name(self) -> str:
            return self._loaded.tokenizer.sha256

    cli_evaluate()


if __name__ == "__main__":
    with user_errors():
        main()
