"""Start a run from another run's weights (checkpoint.init_from), also with a different vocabulary."""

import torch
from torch import Tensor, nn

from mdmtrain.checkpoint import store
from mdmtrain.checkpoint.loading import copy_into
from mdmtrain.checkpoint.resume import brief
from mdmtrain.checkpoint.weights import chosen_weights
from mdmtrain.config import Config
from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.parallel.world import AgreedError, World

PER_PIECE = ("embed.weight", "head.weight")  # parameters with one row per token of the vocabulary


def load_initial_weights(config: Config, identity: dict, tokenizer: Tokenizer, model: nn.Module, world: World) -> str:
    """Load another run's weights (their EMA, if it has one) into the model. Returns a description of them.

    With checkpoint.resize_vocab the other run may have a different vocabulary. Raises AgreedError. A collective.
    """
    source_run = config.checkpoint.init_from
    assert source_run is not None
    folder = world.agree(lambda: store.find(source_run), main_only=True)
    meta = world.agree(lambda: store.read_meta(folder), main_only=True)
    saved = meta["identity"]
    resize = config.checkpoint.resize_vocab
    where = f"checkpoint.init_from={folder}"
    networks = [{**one["model"], "vocab_size": None} for one in (saved, identity)]
    if networks[0] != networks[1]:
        raise AgreedError(f"{where}: its model is {brief(*networks)}: start from weights of the same network")
    vocabularies = [(one["model"]["vocab_size"], one["tokenizer"]) for one in (saved, identity)]
    other = vocabularies[0] != vocabularies[1]
    if other and not resize:
        (rows, theirs), (wanted, ours) = vocabularies
        what = "it has a different tokenizer"
        if rows != wanted:
            what = f"its vocabulary has {rows} rows, not {wanted}"
            if theirs != ours:
                what += ", and it has a different tokenizer"
        raise AgreedError(
            f"{where}: {what}: start from weights with the same vocabulary, or set checkpoint.resize_vocab=true: rows "
            "of the embedding and the head are then copied by token, and new tokens start at the mean row"
        )
    if problem := store.damage(folder, world):
        raise AgreedError(f"{where}: {problem}: use another checkpoint")
    source = chosen_weights(folder, meta, None)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    by_piece = [name for name in PER_PIECE if name in parameters] if other else []
    old = {name: torch.empty(saved["model"]["vocab_size"], parameters[name].shape[1]) for name in by_piece}
    store.load(folder, meta, {f"{source}.{name}": tensor for name, tensor in (parameters | old).items()}, world)
    if not other:
        return str(folder)
    pieces = world.agree(lambda: Tokenizer.load(folder / store.TOKENIZER_FILE).pieces())
    rows = rows_by_piece(pieces, tokenizer.pieces(), identity["model"]["vocab_size"])
    kept = int((rows >= 0).sum())
    if not kept:
        raise AgreedError(f"{where}: the two vocabularies have no token in common: start from other weights")
    for name in by_piece:
        copy_into(parameters[name], resized(old[name], rows, len(pieces)))
    others = "all others start at the mean row"
    return f"{folder}, resized: {kept} of {tokenizer.vocab_size} tokens keep their rows, {others}"


def rows_by_piece(old: list[str], new: list[str], rows: int) -> Tensor:
    """For each row of a new vocabulary, the row of the same token in the old one, or -1: int64 [rows]."""
    ids = {piece: number for number, piece in enumerate(old)}
    return torch.tensor([ids.get(piece, -1) for piece in new] + [-1] * (rows - len(new)))


def resized(old: Tensor, rows: Tensor, used: int) -> Tensor:
    """The given rows, int64 [R], of a matrix [V, d]. For -1, the mean of its first `used` rows. Returns [R, d]."""
    return torch.where(rows[:, None] >= 0, old[rows.clamp(min=0)], old[:used].mean(dim=0))
