"""FlexAttention's block mask against SDPA's boolean mask: what a CUDA run uses against the reference.

FlexAttention's own code refuses gradients on the CPU, but its dense form is the mathematics of its kernels: that runs.
"""

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch._dynamo.utils import counters

import mdmtrain.model.transformer as transformer
from mdmtrain.model import attention
from mdmtrain.model.presets import ModelShape
from tests.model.test_model import build

L = 150  # not whole blocks of 128


def documents() -> torch.Tensor:
    """Three rows: documents and pads, a row cut short, documents of one token at both ends."""
    segments = torch.zeros(3, L, dtype=torch.int32)
    segments[0, 40:], segments[0, 130:] = 1, -1
    segments[1, 9:] = -1
    segments[2, 1:], segments[2, 149:] = 5, 6
    return segments


@pytest.fixture
def dense_flex(monkeypatch):
    monkeypatch.setattr(attention, "_compiled", lambda function: function)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_block_mask_is_the_boolean_mask(dense_flex, monkeypatch, causal):
    """Losses and gradients, grouped heads. A mask that let pads or other documents in would be far off."""
    shape = ModelShape(vocab_size=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, causal=causal)
    model, segments = build(shape), documents()
    ids = (torch.arange(3 * L) * 7 % 60).view(3, L)
    positions = torch.arange(0, 3 * L, 3)

    def run(documents):
        model.zero_grad()
        losses = model(ids, positions, ids.flatten()[positions], documents)
        losses.sum().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    losses, gradient = run(segments)
    other = run(segments.clamp(min=0))[0]
    monkeypatch.setattr(transformer, "attention_mask", lambda seen, s: attention.block_mask(seen, s.causal))
    flex_losses, flex_gradient = run(segments)
    for ours, theirs in ((flex_losses, losses), (flex_gradient, gradient)):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert (other - losses).norm() > 1e-2 * losses.norm()


def test_new_documents_make_no_new_graph(dense_flex):
    """A compiled block takes every batch's block mask: the closure of its rule is new, its code is not."""
    shape = ModelShape(vocab_size=64, d_model=64, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=64)
    layer = build(shape).layers[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    counters.clear()
    x = torch.randn(3, L, 64, generator=torch.Generator().manual_seed(0))
    angles = attention.rotary_angles(L, 16, 1e4, x.device)
    with torch.no_grad():
        for shift in range(3):
            segments = documents().roll(shift, 0)
            out = compiled(x, *angles, attention.block_mask(segments, causal=False))
            expected = layer(x, *angles, attention.attention_mask(segments, shape))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_where_each_is_used():
    assert attention.takes_flex(torch.device("cuda"), 64)
    assert not attention.takes_flex(torch.device("cuda"), 8), "its kernels begin at 16"
    assert not attention.takes_flex(torch.device("cpu"), 64)
