"""What a person should know about the data of a run before it starts."""

import numpy as np

from mdmtrain.config import Config
from mdmtrain.data.loader import windows
from mdmtrain.data.order import Cursor
from mdmtrain.data.shards import PreparedSplit


def describe_epochs(config: Config, sources: list[PreparedSplit], cursor: Cursor) -> list[str]:
    """How often each source will have been read at the end of the run: a line for each."""
    samples = cursor.at(config.run.steps, config.slots_per_step, 0).sample
    weights = [source.weight for source in config.data.sources]
    lines = []
    for source, weight in zip(sources, weights, strict=True):
        rows, share = windows(source, config.data.sequence_length), weight / sum(weights)
        lines.append(
            f"{source.folder}: {samples * share / rows:.2f} epochs by step {config.run.steps:,} "
            f"({samples * share:,.0f} reads of {rows:,} rows, {share:.1%} of the mixture)"
        )
    return lines


def shared_documents(train: list[PreparedSplit], validation: list[PreparedSplit]) -> list[str]:
    """A warning for each validation split of which documents are also in the train split of another source.

    In one folder there are none: preparation sends documents that differ in white space, case or the encoding of
    characters alone to the same split. Reads 8 bytes for each training document, where there are several sources.
    """
    lines = []
    for held_out in validation:
        others = [source for source in train if source.folder.resolve() != held_out.folder.resolve()]
        if not others:
            continue
        hashes = np.concatenate([np.empty(0, np.int64), *held_out.document_hashes()])
        if len(hashes) < held_out.documents:
            lines.append(f"{held_out.folder}: made by an older version: whether train has its documents is not known")
            continue
        wanted, places = np.unique(hashes, return_inverse=True)
        for source in others:
            found = np.zeros(len(wanted), dtype=bool)
            for part in source.document_hashes():
                at = np.searchsorted(wanted, part).clip(max=len(wanted) - 1)
                found[at[wanted[at] == part]] = True
            count = int(found[places].sum())
            if count:
                lines.append(
                    f"{held_out.folder}: {count:,} of its {held_out.documents:,} validation documents "
                    f"({count / held_out.documents:.1%}) are also in the train split of {source.folder}: their loss "
                    "says nothing about new text. Prepare both with the same --validation-fraction"
                )
    return lines
