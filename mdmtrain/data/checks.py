"""Describe the data of a run before it starts, and refuse a run whose data does not fit its configuration."""

import numpy as np

from mdmtrain.config import Config
from mdmtrain.data.loader import describe_rows, mixture
from mdmtrain.data.order import Cursor, Mixture
from mdmtrain.data.shards import PreparedSplit

MOST_COMPARED = 20_000_000  # maximum number of documents of a split whose hashes are compared


def describe_data(
    config: Config, sources: list[PreparedSplit], validation: list[PreparedSplit], cursor: Cursor
) -> list[str]:
    """Lines about the rows, the mixture and the cache. Raises ValueError if the run must not start."""
    lines = [describe_rows(source, config.data.sequence_length) for source in sources if source.prompts]
    lines += describe_mixture(config, sources, mixture(config, sources, cursor), cursor)
    return lines + describe_cache(config, sources, validation)


def describe_mixture(config: Config, sources: list[PreparedSplit], order: Mixture, cursor: Cursor) -> list[str]:
    """The lines of a table with the number of epochs of each source at the end of the run.

    Raises ValueError if a source is read for more than its max_epochs.
    """
    steps = config.run.steps
    data = config.data
    reads = order.counts(cursor.at(steps, config.slots_per_step, 0).sample)
    table = [("source", "tokens", "weight", f"epochs by step {steps:,}")]
    for number, (source, configured) in enumerate(zip(sources, data.sources, strict=True)):
        epochs = reads[number] / order.sources[number].size
        if configured.max_epochs is not None and epochs > configured.max_epochs:
            raise ValueError(
                f"{source.folder}: {epochs:.2f} epochs by step {steps:,} are more than its "
                f"max_epochs={configured.max_epochs:g}: lower its weight or run.steps, add data, or raise max_epochs"
            )
        phases = [(0, data.weights), *((phase.from_step, phase.weights) for phase in data.phases)]
        shares = [f"{w[number] / sum(w):.1%}" + (f" from step {step:,}" if step else "") for step, w in phases]
        table.append((str(source.folder), f"{source.tokens:,}", ", ".join(shares), f"{epochs:.2f}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        f"{name:<{widths[0]}}  {tokens:>{widths[1]}}  {weight:>{widths[2]}}  {epochs:>{widths[3]}}"
        for name, tokens, weight, epochs in table
    ]


def cache_need(config: Config, sources: list[PreparedSplit], validation: list[PreparedSplit]) -> int:
    """Bytes that the cache must hold at a time: the validation splits, and two turns of each source (see Shuffle)."""
    mask = config.data.document_mask
    together = config.data.shuffle_shards
    need = sum(int(split.row_bytes(mask).sum()) for split in validation if split.cache is not None)
    for source in sources:
        if source.cache is not None:
            sizes = np.sort(source.row_bytes(mask))
            need += int(sizes.sum() if together is None else min(2 * sizes[-together:].sum(), sizes.sum()))
    return need


def describe_cache(config: Config, sources: list[PreparedSplit], validation: list[PreparedSplit]) -> list[str]:
    """A line that says how much the cache must hold at a time; no line if no source is in an object store.

    Raises ValueError if the cache's limit is lower.
    """
    need = cache_need(config, sources, validation)
    data = config.data
    together = config.data.shuffle_shards
    if not need:
        return []
    what = "all shards" if together is None else f"twice data.shuffle_shards={together} shards of each source"
    line = f"shards are copied to {data.cache_dir}, {need / 1e9:,.3g} GB at a time ({what}, and the validation splits)"
    if need > data.cache_gb * 1e9:
        how = "set data.shuffle_shards" if together is None else "lower data.shuffle_shards"
        raise ValueError(f"{line}, more than data.cache_gb={data.cache_gb:g}: raise it, or {how}")
    return [line]


def shared_documents(train: list[PreparedSplit], validation: list[PreparedSplit]) -> list[str]:
    """A warning for each pair of a validation split and the train split of another source that share documents.

    The splits of one folder share none: preparation puts documents that differ only in white space, case or the
    encoding of characters into the same split. If there are several sources, this reads 8 bytes for each training
    document. From a split with more than MOST_COMPARED documents, it reads the hashes of about MOST_COMPARED.
    """
    lines = []
    for held_out in validation:
        others = [source for source in train if source.folder.resolve() != held_out.folder.resolve()]
        if not others:
            continue
        hashes = np.concatenate([np.empty(0, np.int64), *held_out.document_hashes(MOST_COMPARED)])
        if len(hashes) < held_out.documents_of(held_out.some_shards(MOST_COMPARED)):
            lines.append(
                f"{held_out.folder}: made by an older version: it is not known whether train splits share documents"
            )
            continue
        wanted, places = np.unique(hashes, return_inverse=True)
        for source in others:
            found = np.zeros(len(wanted), dtype=bool)
            for part in source.document_hashes(MOST_COMPARED):
                at = np.searchsorted(wanted, part).clip(max=len(wanted) - 1)
                found[at[wanted[at] == part]] = True
            count = int(found[places].sum())
            seen = source.documents_of(source.some_shards(MOST_COMPARED))
            if count:
                sample = f" (of {seen:,} of its {source.documents:,} documents)" if seen < source.documents else ""
                lines.append(
                    f"{held_out.folder}: {count:,} of its {len(hashes):,} validation documents "
                    f"({count / len(hashes):.1%}) are also in the train split of {source.folder}{sample}: their loss "
                    "says nothing about new text. Prepare both with the same --validation-fraction"
                )
    return lines
