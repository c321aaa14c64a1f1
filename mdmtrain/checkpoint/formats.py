"""The parameter names and configurations of a model in other programs. Export and import use the same tables.

`native` uses our own names. `llama` is LlamaForCausalLM of transformers, made bidirectional by `is_causal: false`.
`qwen3` is Qwen3ForCausalLM of transformers, the same network with RMSNorm on queries and keys. `llada` uses the names
and the configuration of LLaDA's own code (arXiv 2502.09992). Values are never changed: our rotary layout is the half
rotation of Llama, so no matrix is permuted.
"""

import re
from dataclasses import replace
from typing import Any

import torch

from mdmtrain.data.tokenizer import Tokenizer
from mdmtrain.model.presets import ModelShape
from mdmtrain.model.transformer import Transformer

MODEL_TYPES = {"native": "mdmtrain", "llama": "llama", "llada": "llada", "qwen3": "qwen3"}
TRANSFORMERS = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # formats of transformers, and their classes
LENGTHS = {
    "native": "sequence_length", "llama": "max_position_embeddings", "llada": "max_sequence_length",
    "qwen3": "max_position_embeddings",
}  # fmt: skip
# The first version of transformers that respects is_causal. Older ones (up to 5.1) load the same folder with causal
# attention and without a warning.
MINIMUM_TRANSFORMERS = "5.2.0"


def _table(text: str) -> dict[str, dict[str, str]]:
    """Parse rows of our name, the name in transformers (llama, qwen3) and the name in llada.

    Returns {our name: {target: its name}}.
    """
    rows = map(str.split, text.strip().splitlines())
    return {ours: {"native": ours, "llama": hub, "qwen3": hub, "llada": llada} for ours, hub, llada in rows}


# A name ends in .weight; {} is the number of the block.
TENSORS = _table("""
embed                        model.embed_tokens                        model.transformer.wte
layers.{}.attention_norm     model.layers.{}.input_layernorm           model.transformer.blocks.{}.attn_norm
layers.{}.attention.q_proj   model.layers.{}.self_attn.q_proj          model.transformer.blocks.{}.q_proj
layers.{}.attention.k_proj   model.layers.{}.self_attn.k_proj          model.transformer.blocks.{}.k_proj
layers.{}.attention.v_proj   model.layers.{}.self_attn.v_proj          model.transformer.blocks.{}.v_proj
layers.{}.attention.o_proj   model.layers.{}.self_attn.o_proj          model.transformer.blocks.{}.attn_out
layers.{}.attention.q_norm   model.layers.{}.self_attn.q_norm          -
layers.{}.attention.k_norm   model.layers.{}.self_attn.k_norm          -
layers.{}.mlp_norm           model.layers.{}.post_attention_layernorm  model.transformer.blocks.{}.ff_norm
layers.{}.mlp.gate_proj      model.layers.{}.mlp.gate_proj             model.transformer.blocks.{}.ff_proj
layers.{}.mlp.up_proj        model.layers.{}.mlp.up_proj               model.transformer.blocks.{}.up_proj
layers.{}.mlp.down_proj      model.layers.{}.mlp.down_proj             model.transformer.blocks.{}.ff_out
norm                         model.norm                                model.transformer.ln_f
head                         lm_head                                   model.transformer.ff_out
""")
SIZES = _table("""
vocab_size       vocab_size           embedding_size
d_model          hidden_size          d_model
n_layers         num_hidden_layers    n_layers
n_heads          num_attention_heads  n_heads
n_kv_heads       num_key_value_heads  n_kv_heads
d_ff             intermediate_size    mlp_hidden_size
tied_embeddings  tie_word_embeddings  weight_tying
rope_theta       rope_theta           rope_theta
norm_eps         rms_norm_eps         rms_norm_eps
init_std         initializer_range    init_std
head_dim         head_dim             -
causal           -                    -
qk_norm          -                    -
""")
# Settings that make the other program's network equal to ours. Export writes them, and import checks them.
FIXED = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None},
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "rope_scaling": None},
    "llada": {
        "layer_norm_type": "rms", "block_type": "llama", "activation_type": "silu", "include_bias": False,
        "include_qkv_bias": False, "bias_for_layer_norm": False, "layer_norm_with_affine": True,
        "input_emb_norm": False, "attention_layer_norm": False, "alibi": False, "rope": True,
        "rope_full_precision": True, "scale_logits": False,
    },
    "native": {},
}  # fmt: skip


def _sizes(target: str) -> dict[str, str]:
    """The fields of ModelShape that the target has, with the target's names."""
    return {ours: words[target] for ours, words in SIZES.items() if words[target] != "-"}


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters by our names, in the order of the model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(shape, 1).named_parameters()}


def name_in(target: str, name: str) -> str:
    """The name in `target` of our parameter `name`."""
    if target == "native":
        return name
    block = re.search(r"\d+", name)
    row = TENSORS[re.sub(r"\d+", "{}", name).removesuffix(".weight")]
    return row[target].format(block and block[0]) + ".weight"


def check_expressible(shape: ModelShape, target: str) -> None:
    """Raise ValueError if `target` cannot express the model."""
    if target in ("llama", "llada") and shape.qk_norm:
        raise ValueError(
            f"{target} cannot express qk_norm (RMSNorm on queries and keys): use --to qwen3 or --to native"
        )
    if target == "qwen3" and not shape.qk_norm:
        raise ValueError("qwen3 needs qk_norm (RMSNorm on queries and keys), which this model lacks: use --to llama")
    if target == "llada" and shape.head_dim * shape.n_heads != shape.d_model:
        raise ValueError("llada cannot express a head_dim other than d_model / n_heads: use --to native or --to llama")
    if target == "llada" and shape.causal:
        raise ValueError("llada cannot express causal attention: use --to native or --to llama")


def config_for(target: str, shape: ModelShape, tokenizer: Tokenizer, sequence_length: int, dtype: str) -> dict:
    """The content of the target's config.json. sequence_length: tokens in a row during training."""
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad", "mask")}
    config = {"model_type": MODEL_TYPES[target], LENGTHS[target]: sequence_length, "dtype": dtype, **ids}
    config |= {theirs: getattr(shape, ours) for ours, theirs in _sizes(target).items()} | FIXED[target]
    match target:
        case "llama" | "qwen3":
            config |= {
                "architectures": [TRANSFORMERS[target]], "is_causal": shape.causal,
                "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
                "attention_dropout": 0.0, "use_cache": False, "transformers_version": MINIMUM_TRANSFORMERS,
            }  # fmt: skip
        case "llada":
            config |= {
                "architectures": ["LLaDAModelLM"], "vocab_size": shape.vocab_size, "block_group_size": 1,
                "mlp_ratio": max(round(shape.d_ff / shape.d_model), 1), "attention_dropout": 0.0,
                "residual_dropout": 0.0, "embedding_dropout": 0.0, "flash_attention": False,
                "init_device": "meta", "init_fn": "normal", "use_cache": False,
            }  # fmt: skip
    return config


def shape_from(target: str, config: dict) -> tuple[ModelShape, int]:
    """The model that a config.json describes, and its sequence length. Raises ValueError.

    A Llama or Qwen3 without `is_causal: false` is causal.
    """
    if config.get("model_type") != MODEL_TYPES[target]:
        raise ValueError(f"its model_type is {config.get('model_type')!r}, but {target} needs {MODEL_TYPES[target]!r}")
    rope = config.get("rope_parameters") or {"rope_theta": 10_000.0}
    head_dim = {"head_dim": 128 if target == "qwen3" else 0}  # the default of transformers
    defaults: dict[str, Any] = {
        "num_key_value_heads": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        **head_dim,
    }
    defaults |= {**rope, **config}
    missing = [key for key in [*_sizes(target).values(), LENGTHS[target]] if key not in defaults]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values = {ours: defaults[theirs] for ours, theirs in _sizes(target).items()}
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]  # null: n_heads
    values["head_dim"] = values.get("head_dim") or 0  # null: d_model / n_heads
    values["vocab_size"] = values["vocab_size"] or config.get("vocab_size")
    shape = ModelShape(**values)
    other = {k: config[k] for k, value in FIXED[target].items() if (config.get(k, value) or False) != (value or False)}
    if target in TRANSFORMERS:
        shape = replace(shape, causal=config.get("is_causal") is not False, qk_norm=target == "qwen3")
        if rope.get("rope_type", "default") != "default":
            other["rope_type"] = rope["rope_type"]
        windows = set(config.get("layer_types") or ()) - {"full_attention"}
        if windows:
            other["layer_types"] = sorted(windows)
    if other:
        raise ValueError(f"our model does not support {other}")
    return shape, int(defaults[LENGTHS[target]])
