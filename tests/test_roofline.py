"""The roofline against the planner: equal FLOPs, and bytes between matrix products to 10%."""

import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain import cost
from mdmtrain.model.presets import ModelShape
from tools import roofline

SHAPE = ModelShape(vocab_size=2048, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=704, qk_norm=True)
MASKED = 0.5
HEAD = {"head, products", "head, cross-entropy"}


def config_of(**parallel) -> configuration.Config:
    tree = {
        "run": {"dir": "x", "steps": 10, "global_batch": 8, "micro_batch": 8},
        "model": {},
        "data": {"sources": [{"path": "x"}], "sequence_length": 256},
        "optim": {"lr": 1e-3},
        "parallel": {"compute_dtype": "bfloat16", **parallel},
    }
    return configuration.validate(tree, "test")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "ops", "selective", "full"])
def test_the_plan_counts_what_the_model_does(compiled, recompute):
    """A plan without recomputation would be 25% off in FLOPs. Eager instead of compiled bytes would be 50% off."""
    config = config_of(compile=compiled, activation_checkpointing=recompute)
    kinds = roofline.traced(config, SHAPE, MASKED)
    tokens = config.run.global_batch * config.data.sequence_length
    _, products, attention = cost.step_flops(SHAPE, config, MASKED)
    gains = {"none": 3, "ops": 3, "selective": 3.5, "full": 4}[recompute] * 2 * SHAPE.n_layers * tokens
    gains *= 2 * SHAPE.d_model + 2 * SHAPE.head_dim  # the planner counts the weights of the norms as matrices
    # In eager mode, recomputation stops before a block's last product, because nothing needs its output.
    last = {"selective": 2, "full": 4}.get(recompute, 0) * 2 * SHAPE.d_ff * SHAPE.d_model * tokens
    assert kinds["products"].flops + kinds["head, products"].flops == products - gains - last
    assert kinds["attention"].flops == attention
    between = sum(work.bytes for kind, work in kinds.items() if kind not in {"products", "attention", *HEAD})
    planned = tokens * SHAPE.n_layers * cost.block_bytes(SHAPE, config)
    ends = 8 * tokens * 2 * SHAPE.d_model  # embedding, rows and norm: small, and not in the plan
    assert planned == pytest.approx(between, rel=0.1, abs=2 * ends)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk", [512, 4096])
def test_logits(compiled, chunk):
    """In one chunk and in two: equal FLOPs, bytes to 10%. A plan without recomputation would be 25% off in FLOPs."""
    config = config_of(compile=compiled, head_chunk=chunk)
    kinds = roofline.traced(config, SHAPE, MASKED)
    rows = int(MASKED * config.run.global_batch * config.data.sequence_length)
    once, again = cost.LOGIT_BYTES[compiled]
    logits = rows * SHAPE.vocab_size
    assert kinds["head, products"].flops == (3 if chunk > rows else 4) * 2 * logits * SHAPE.d_model
    planned = logits * (once if chunk > rows else once + again)
    of_rows = (
        2 * rows * SHAPE.d_model
    )  # splitting rows and adding their gradients: small at real sizes, and not in the plan
    assert kinds["head, cross-entropy"].bytes == pytest.approx(planned, rel=0.1, abs=10 * of_rows)


def test_a_roofline_adds_up():
    """The total is the sum without communication, which overlaps. MFU is higher without any kind of operation."""
    config = config_of()
    line = roofline.roofline(config, SHAPE, 8, cost.GPUS["h100"], cost.Assumptions())
    assert line.rows == 1  # of the 8 that are configured: the global batch has 8, for 8 GPUs
    kinds = {kind: ms for kind, ms in line.milliseconds.items() if kind != "communication"}
    compute = sum(kinds.values()) - kinds["optimizer"]
    assert line.total == pytest.approx(max(compute, line.milliseconds["communication"]) + kinds["optimizer"])
    assert line.mfu() < line.mfu(without="communication") < 1
    counted, *_ = cost.step_flops(SHAPE, config, cost.mean_masked(config, cost.Assumptions()))
    assert line.mfu() == pytest.approx(counted / 8 / 989e12 / (line.total / 1e3))
    fewer = roofline.roofline(config, SHAPE, 8, cost.GPUS["h100"], cost.Assumptions(masked=0.25))
    ratio = fewer.kinds["head, products"].flops / line.kinds["head, products"].flops
    assert ratio == pytest.approx(0.5, abs=0.01)  # the mean masking rate is 0.5005
    assert torch.get_default_dtype() == torch.float32  # the trace changes it and sets it back


def test_float8_is_not_counted_and_so_refused():
    with pytest.raises(ValueError, match="counts no float8 products"):
        roofline.roofline(config_of(float8=True), SHAPE, 8, cost.GPUS["h100"], cost.Assumptions())
