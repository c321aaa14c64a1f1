"""The network: its shape, what each position may see, and a head that never holds all logits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from mdmtrain.config import ModelConfig
from mdmtrain.model.attention import rotary_angles, rotate
from mdmtrain.model.head import Head
from mdmtrain.model.presets import PRESETS, ModelShape, model_shape
from mdmtrain.model.transformer import Transformer, initial_std

SHAPE = ModelShape(vocab_size=48, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=64)
L = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(shape=SHAPE, chunk=4096, seed=0, **changes) -> Transformer:
    shape = dataclasses.replace(shape, **changes)
    model = Transformer(shape, chunk)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        std = initial_std(name, shape)
        # Far larger than at a real start, so that attention is not flat and every path shows.
        p.data = torch.ones_like(p) if std is None else torch.randn(p.shape, generator=generator) * 10 * std
    return model


def tokens(rows=2, length=L, seed=1):
    return torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, segments=None):
    """[B, L, V]"""
    return model(ids, torch.arange(ids.numel()), None, segments).view(*ids.shape, -1)


def differ(a, b, by=1e-2):
    return float((a - b).detach().abs().max()) > by


# ---- shape


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"tied_embeddings": True}, {"tied_embeddings": False}])
def test_parameters_are_counted_as_they_are(name, change):
    shape = model_shape(ModelConfig(preset=name, **change), tokenizer_size=1000)
    assert shape.vocab_size == 1024  # 1000 rounded up to a multiple of 64
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(shape, n_layers=2), head_chunk=1)  # blocks are alike
    of_two = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.layers[0].parameters())
    assert shape.parameters() == of_two + (shape.n_layers - 2) * block


def test_preset_8b_is_llada_8b():
    shape = model_shape(ModelConfig(preset="8b", vocab_size=126464), tokenizer_size=126349)
    assert shape.parameters() == 8_015_581_184
    expected = dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=12288, vocab_size=126464)
    expected |= dict(rope_theta=500_000.0, norm_eps=1e-5, tied_embeddings=False, qk_norm=False)
    assert {name: getattr(shape, name) for name in expected} == expected
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(shape, 1).parameters()) == 8_015_581_184


def test_presets_are_named_by_the_parameters_of_their_blocks():
    units = {"m": 1e6, "b": 1e9}
    for name, values in PRESETS.items():
        shape = ModelShape(vocab_size=64, **values)
        embeddings = 64 * shape.d_model * (1 if shape.tied_embeddings else 2)
        said = float(name[:-1]) * units[name[-1]]
        assert abs((shape.parameters() - embeddings) / said - 1) < 0.13, name


def test_fields_given_override_the_preset():
    shape = model_shape(ModelConfig(preset="2m", n_layers=3, tied_embeddings=False, init_std=0.5), 100)
    assert (shape.n_layers, shape.tied_embeddings, shape.init_std, shape.d_model) == (3, False, 0.5, 192)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"preset": "9b"}, "model.preset='9b' is unknown: use one of 2m"),
        ({}, "model.d_model, model.n_layers, model.n_heads, model.n_kv_heads, model.d_ff missing"),
        ({"preset": "2m", "vocab_size": 999}, "model.vocab_size=999 is smaller than the tokenizer's 1000"),
        ({"preset": "2m", "d_model": 190}, "model.d_model=190 is not a multiple of model.n_heads=6"),
        ({"preset": "2m", "d_model": 18}, "model.head_dim=3 (default: d_model / n_heads) must be even"),
        ({"preset": "2m", "head_dim": 7}, "model.head_dim=7 (default: d_model / n_heads) must be even"),
        ({"preset": "2m", "n_kv_heads": 4}, "model.n_heads=6 is not a multiple of model.n_kv_heads=4"),
        ({"preset": "2m", "n_kv_heads": 12}, "model.n_heads=6 is not a multiple of model.n_kv_heads=12"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(values, said):
    with pytest.raises(ValueError) as caught:
        model_shape(ModelConfig(**values), tokenizer_size=1000)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- what sees what


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_position_sees_every_other_in_both_directions(qk_norm):
    model, ids = build(n_layers=1, qk_norm=qk_norm), tokens(rows=1)
    before = logits(model, ids)[0]
    for changed in (0, 5, L - 1):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 48
        moved = (logits(model, other)[0] - before).abs().amax(dim=1)
        assert (moved > 1e-5).all()  # a causal model leaves everything before `changed` as it was


def test_a_causal_mask_would_be_noticed(monkeypatch):
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: real(q, k, v, is_causal=True))
    with pytest.raises(AssertionError):
        test_every_position_sees_every_other_in_both_directions(False)


def test_rows_of_a_batch_do_not_see_each_other():
    model, ids = build(), tokens(rows=3)
    together = logits(model, ids)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_rotary_products_depend_on_the_distance_alone():
    cos, sin = rotary_angles(64, 16, 10_000.0, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 64, 16)
    products = (rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(-1, -2))[0, 0]
    for distance in (-40, -3, 0, 1, 17):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert differ(products.diagonal(3)[:1], products.diagonal(4)[:1])
    assert differ(products.diagonal(3)[:1], products.diagonal(-3)[:1])  # direction counts
    only_keys = (q @ rotate(k, cos, sin).transpose(-1, -2))[0, 0].diagonal(3)
    assert differ(only_keys, only_keys[:1].expand_as(only_keys))


def test_rotary_layout_is_llamas():
    """Pair (i, i + d/2) turns by position * theta^(-2i/d): a complex product. GPT-J pairs (2i, 2i + 1)."""
    d, theta, position = 8, 500.0, 5
    cos, sin = rotary_angles(9, d, theta, torch.device("cpu"))
    x = torch.randn(1, 1, 9, d, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)[0, 0, position]
    angles = torch.tensor([position * theta ** (-2 * i / d) for i in range(d // 2)])
    row, turn = x[0, 0, position], torch.polar(torch.ones(d // 2), angles)
    llama = torch.complex(row[: d // 2], row[d // 2 :]) * turn
    torch.testing.assert_close(turned, torch.cat([llama.real, llama.imag]), rtol=1e-5, atol=1e-5)
    neighbours = torch.view_as_real(torch.view_as_complex(row.view(-1, 2)) * turn).flatten()
    assert differ(turned, neighbours)


def test_rotation_is_done_in_float32_whatever_comes_in():
    cos, sin = rotary_angles(4096, 16, 10_000.0, torch.device("cpu"))
    x = torch.ones(1, 1, 4096, 16)
    turned = rotate(x.bfloat16(), cos, sin)
    assert turned.dtype == torch.bfloat16 and cos.dtype == torch.float32
    assert torch.equal(turned, rotate(x, cos, sin).bfloat16())
    # Angles in bfloat16 are off by whole radians at position 4,000.
    assert differ(torch.arange(4096).bfloat16().float().cos(), torch.arange(4096).float().cos(), by=0.5)


def test_grouped_heads_are_repeated_key_value_heads():
    grouped = build(n_kv_heads=2)
    full, tiled = build(), build()

    def spread(weight, tile):
        heads = weight.view(2, 8, 32)
        return (heads.repeat(2, 1, 1) if tile else heads.repeat_interleave(2, dim=0)).reshape(32, 32)

    for model, tile in ((full, False), (tiled, True)):
        state = grouped.state_dict()
        for name in state:
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                state[name] = spread(state[name], tile)
        model.load_state_dict(state)
    ids = tokens()
    torch.testing.assert_close(logits(grouped, ids), logits(full, ids), rtol=1e-4, atol=1e-4)
    assert differ(logits(grouped, ids), logits(tiled, ids))  # head h uses kv head h // 2, not h % 2


def test_qk_norm_takes_the_scale_out_of_queries_and_keys():
    for qk_norm in (True, False):
        model, ids = build(qk_norm=qk_norm), tokens()
        before = logits(model, ids)
        for layer in model.layers:
            layer.attention.q_proj.weight.data *= 8
            layer.attention.k_proj.weight.data *= 0.25
        same = torch.allclose(before, logits(model, ids), rtol=1e-3, atol=1e-3)
        assert same == qk_norm
    names = [name for name, _ in build(qk_norm=True).named_parameters()]
    gains = [name for name in names if name.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(gains) == 2 * SHAPE.n_layers


# ---- documents and padding


def test_a_document_in_a_row_is_as_it_is_alone():
    model = build()
    ids = tokens(rows=2)
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
    packed = logits(model, ids, segments)
    for row, first, last in ((0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 7), (1, 7, 12)):
        alone = logits(model, ids[row : row + 1, first:last])[0]  # from position 0 on: rotary is relative
        torch.testing.assert_close(packed[row, first:last], alone, rtol=1e-4, atol=1e-4)
        assert differ(logits(model, ids)[row, first:last], alone)  # without the mask it is not


def test_a_document_may_be_in_pieces_and_labels_are_only_compared():
    model, ids = build(), tokens(rows=1)
    pieces = torch.tensor([[4] * 3 + [9] * 5 + [4] * 4])
    base = logits(model, ids, pieces)
    assert torch.equal(base, logits(model, ids, torch.where(pieces == 4, -1, 70000)))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 48
    moved = (logits(model, other, pieces) - base)[0].abs().amax(dim=1) > 1e-5
    assert moved.tolist() == [True] * 3 + [False] * 5 + [True] * 4


def test_padding_has_no_influence_and_makes_no_nan():
    model = build()
    ids = tokens(rows=2)
    lengths = torch.tensor([7, 1])
    padding = torch.arange(L) >= lengths[:, None]
    segments = padding.long()
    base = logits(model, ids, segments)
    other = torch.where(padding, (ids + 11) % 48, ids)
    assert torch.isfinite(base).all()
    assert torch.equal(logits(model, other, segments)[~padding], base[~padding])
    assert differ(logits(model, other)[~padding], logits(model, ids)[~padding])
    torch.testing.assert_close(base[0, :7], logits(model, ids[:1, :7])[0], rtol=1e-4, atol=1e-4)


def test_one_segment_is_no_mask():
    model, ids = build(), tokens()
    same = logits(model, ids, torch.zeros(2, L, dtype=torch.int64))
    torch.testing.assert_close(same, logits(model, ids), rtol=1e-4, atol=1e-4)


# ---- the head


def dense(rows, targets, weight):
    return F.cross_entropy((rows @ weight.T).float(), targets, reduction="none")


def chunked_head(chunk, tied):
    """A function (rows, targets, weight) -> losses, through Head."""

    def losses(rows, targets, weight):
        head = Head(16, 50, tied, chunk)
        if not tied:
            del head.weight  # the parameter: `weight` in its place, so that the gradient arrives there
            head.weight = weight
        return head(rows, targets, weight if tied else None)

    return losses


def disagreement(losses_of, K):
    """Largest difference of losses and of gradients from the dense computation; None for another shape or dtype."""
    generator = torch.Generator().manual_seed(K)
    rows, weight = torch.randn(K, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets, scale = torch.randint(0, 50, (K,), generator=generator), torch.rand(K, generator=generator)
    results = []
    for function in (losses_of, dense):
        r, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = function(r, targets, w)
        if losses.shape != (K,) or losses.dtype != torch.float32:
            return None
        (losses * scale).sum().backward()
        if r.grad is None or w.grad is None:
            return None
        results.append(torch.cat([losses.detach(), r.grad.flatten(), w.grad.flatten()]))
    return float((results[0] - results[1]).abs().max())


@pytest.fixture
def loss_graphs(monkeypatch):
    """torch.compile partitions graphs as for a GPU, and generates no code. The list gets an entry for each graph."""
    made, compile = [], torch.compile
    real = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph), decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip

    def backend(graph, inputs):
        made.append(graph)
        return real(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, **more: compile(function, backend=backend, **more))
    yield made
    torch.compiler.reset()


def test_the_compiled_loss_is_the_dense_one_in_one_graph(loss_graphs):
    head = Head(16, 50, True, 30)
    head.compile_loss()
    for K in (24, 0, 1, 23, 2, 30, 70):  # 70: in chunks of 30, 30 and 10
        difference = disagreement(lambda rows, targets, weight: head(rows, targets, weight), K)
        assert difference is not None and difference < 1e-5, K
    assert len(loss_graphs) == 1


def test_the_compiled_loss_keeps_narrow_logits(loss_graphs):
    """2 bytes for each logit in bfloat16, and a few numbers for each row. The eager loss keeps 4 for each logit."""
    rows, weight = torch.randn(64, 16).bfloat16().requires_grad_(), torch.randn(4096, 16).bfloat16().requires_grad_()
    kept = {}
    for compiled in (False, True):
        head, found = Head(16, 4096, True, 100), {}
        if compiled:
            head.compile_loss()

        def pack(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = head(rows, torch.arange(64), weight)
        kept[compiled] = sum(found.values()) - weight.nbytes
        assert loss.requires_grad
    assert 2 <= kept[True] / (64 * 4096) < 2.1 < 4 <= kept[False] / (64 * 4096)


@pytest.mark.parametrize("K", [0, 1, 23, 24])
@pytest.mark.parametrize("chunk", [1, 4, 8, 23, 24, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_are_the_dense_cross_entropy_with_its_gradients(monkeypatch, K, chunk, tied):
    made, real = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *more: made.append(len(x)) or real(x, *more))
    difference = disagreement(chunked_head(chunk, tied), K)
    assert difference is not None and difference < 1e-5
    assert max(made) <= chunk  # neither forward nor recomputed in the backward pass are there more rows of logits
    assert sum(made) in (K, 2 * K)  # once, or once more in the backward pass


def in_chunks(rows, targets):
    return list(zip(rows.split(8), targets.split(8), strict=True))


WRONG_HEADS = {
    "only the first chunk reaches the weight": lambda r, t, w: torch.cat(
        [dense(rows, targets, w if k == 0 else w.detach()) for k, (rows, targets) in enumerate(in_chunks(r, t))]
    ),
    "the short chunk is dropped": lambda r, t, w: dense(r[:16], t[:16], w),
    "chunks are averaged": lambda r, t, w: torch.cat(
        [dense(rows, targets, w).mean().expand(len(rows)) for rows, targets in in_chunks(r, t)]
    ),
    "chunks are out of order": lambda r, t, w: torch.cat([dense(*pair, w) for pair in reversed(in_chunks(r, t))]),
    "the softmax is in bfloat16": lambda r, t, w: dense(r.bfloat16(), t, w.bfloat16()).bfloat16().float(),
}


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
@pytest.mark.parametrize("K", [0, 1, 23, 24])
def test_the_fused_head_is_the_dense_cross_entropy_with_its_gradients(K):
    head = Head(16, 50, True, 8, fused=True)
    difference = disagreement(lambda rows, targets, weight: head(rows, targets, weight), K)
    assert difference is not None and difference < 1e-5


@pytest.mark.parametrize("name", WRONG_HEADS)
def test_wrong_heads_are_told_from_the_dense_one(name):
    difference = disagreement(WRONG_HEADS[name], 23)
    assert difference is None or difference > 1e-3


def test_no_logits_of_visible_positions_are_ever_made(monkeypatch):
    """Through the whole model: the head's products have as many rows as positions were asked for, in chunks."""
    model, ids, positions = build(chunk=4), tokens(rows=3), torch.tensor([0, 5, 6, 13, 20, 35])
    made, real = [], F.linear
    vocabulary = SHAPE.vocab_size

    def spy(x, weight, bias=None):
        out = real(x, weight, bias)
        if out.shape[-1] == vocabulary:
            made.append(out.numel() // vocabulary)
        return out

    monkeypatch.setattr(F, "linear", spy)
    model(ids, positions, ids.flatten()[positions]).sum().backward()
    assert made == [4, 2, 2, 4] or made == [4, 2, 4, 2]  # forward; recomputed
    assert max(made) < ids.numel()


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_cross_entropy_is_that_of_its_logits(tied):
    model, ids, positions = build(chunk=3, tied_embeddings=tied), tokens(), torch.tensor([1, 2, 9, 14, 23])
    targets = tokens(seed=9).flatten()[positions]
    ce = model(ids, positions, targets)
    full = logits(model, ids).flatten(0, 1)
    torch.testing.assert_close(ce, F.cross_entropy(full[positions], targets, reduction="none"), rtol=1e-5, atol=1e-5)
    assert differ(ce, F.cross_entropy(full[positions + 0].roll(1, 0), targets, reduction="none"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_batch_without_masked_positions_has_zero_gradients_everywhere(tied):
    """Zero, not None: FSDP and the optimizer wait for every parameter's gradient, on every rank."""
    model, none = build(tied_embeddings=tied), torch.zeros(0, dtype=torch.int64)
    loss = model(tokens(), none, none)
    assert loss.shape == (0,)
    loss.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
    assert logits(model, tokens()).isfinite().all() and model(tokens(), none).shape == (0, 48)


def test_tied_embeddings_are_one_matrix_at_both_ends():
    tied, free = build(tied_embeddings=True), build()
    assert "head.weight" not in dict(tied.named_parameters()) and "head.weight" in dict(free.named_parameters())
    free.load_state_dict({**tied.state_dict(), "head.weight": tied.embed.weight.detach().clone()})
    ids = tokens()
    assert torch.equal(logits(tied, ids), logits(free, ids))
    positions = torch.arange(ids.numel())
    for model in (tied, free):
        model(ids, positions, ids.flatten()).sum().backward()
    both = free.embed.weight.grad + free.head.weight.grad
    torch.testing.assert_close(tied.embed.weight.grad, both, rtol=1e-4, atol=1e-4)
    assert differ(tied.embed.weight.grad, free.head.weight.grad)


def test_bfloat16_rows_give_float32_losses():
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(23, 16, generator=generator), torch.randn(50, 16, generator=generator)
    head, targets = Head(16, 50, True, 8), torch.arange(23)
    losses = head(rows.bfloat16(), targets, weight.bfloat16())
    assert losses.dtype == torch.float32
    assert head(rows.bfloat16(), None, weight.bfloat16()).dtype == torch.float32
    # float32 throughout the softmax: the losses are not rounded to bfloat16's 8 bits.
    assert not torch.equal(losses, losses.bfloat16().float())


# ---- initial weights


@pytest.mark.parametrize("tied", [False, True])
def test_initial_std_of_every_parameter(tied):
    shape = dataclasses.replace(SHAPE, qk_norm=True, tied_embeddings=tied, init_std=0.02)
    residual = 0.02 / (2 * shape.n_layers) ** 0.5
    for name, p in Transformer(shape, 1).named_parameters():
        std = initial_std(name, shape)
        if p.ndim == 1:
            assert std is None, name  # the gains of the norms are ones
        elif "o_proj" in name or "down_proj" in name:
            assert std == pytest.approx(residual), name
        else:
            assert std == 0.02, name


def test_the_residual_stream_keeps_its_variance_with_depth():
    """24 blocks add as much to the stream as 2 do; without the 1/sqrt(2 n_layers) they would add 12 times as much."""

    def growth(n_layers, scaled=True):
        shape = dataclasses.replace(SHAPE, n_layers=n_layers, init_std=0.2)
        model = Transformer(shape, 1)
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            std = initial_std(name, shape)
            std = 0.2 / 2 if std is not None and not scaled and std < 0.2 else std
            p.data = torch.ones_like(p) if std is None else torch.randn(p.shape, generator=generator) * std
        seen = []
        model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(model, tokens(rows=8))
        return float(seen[0].var()) - 0.04

    assert 0.4 < growth(24) / growth(2) < 2.5
    assert growth(24, scaled=False) / growth(2, scaled=False) > 5
