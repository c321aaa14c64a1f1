"""Model shapes: presets from 2M parameters (for a laptop) to LLaDA's 8B, and the shape for a configuration."""

from dataclasses import MISSING, asdict, dataclass, fields

from mdmtrain.config import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """All numbers that define the network. Checkpoints with equal shapes have the same parameters."""

    vocab_size: int  # rows of the embedding; at least the size of the tokenizer
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    causal: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    head_dim: int = 0  # width of one head; 0 means d_model / n_heads

    def __post_init__(self):
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)

    def parameters(self) -> int:
        """The number of parameters."""
        attention = 2 * self.head_dim * (self.d_model * (self.n_heads + self.n_kv_heads) + self.qk_norm)
        block = attention + self.d_model * (3 * self.d_ff + 2)
        ends = self.vocab_size * (1 if self.tied_embeddings else 2)
        return self.n_layers * block + self.d_model * (ends + 1)


def _preset(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, **more) -> dict:
    return dict(d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=d_ff, **more)


# The name is the number of parameters in the blocks, without embedding and head.
PRESETS = {
    "2m": _preset(192, 5, 6, 6, 512, tied_embeddings=True),
    "10m": _preset(320, 8, 5, 5, 864, tied_embeddings=True),
    "45m": _preset(576, 11, 9, 9, 1536),
    "85m": _preset(768, 12, 12, 12, 2048),
    "170m": _preset(896, 18, 14, 14, 2368),
    "400m": _preset(1280, 20, 20, 20, 3456),
    "1b": _preset(2048, 20, 16, 16, 5504),
    "3b": _preset(3072, 26, 24, 8, 8192, rope_theta=500_000.0),
    "8b": _preset(4096, 32, 32, 32, 12288, rope_theta=500_000.0),  # LLaDA-8B
}


def model_shape(config: ModelConfig, tokenizer_size: int) -> ModelShape:
    """The shape for a configuration and a tokenizer of the given size.

    Raises ValueError for an unknown preset, a missing or invalid dimension, or a vocabulary smaller than the tokenizer.
    """
    if config.preset is not None and config.preset not in PRESETS:
        raise ValueError(f"model.preset={config.preset!r} is unknown: use one of {', '.join(PRESETS)}")
    given = {name: value for name, value in config.model_dump(exclude={"preset"}).items() if value is not None}
    values = {"vocab_size": -(-tokenizer_size // 64) * 64, **PRESETS.get(config.preset or "", {}), **given}
    missing = [f"model.{f.name}" for f in fields(ModelShape) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: set them, or set model.preset ({', '.join(PRESETS)})")
    if "head_dim" not in values and values["d_model"] % values["n_heads"]:
        raise ValueError(
            f"model.d_model={values['d_model']} is not a multiple of model.n_heads={values['n_heads']}: change one, or "
            "set model.head_dim"
        )
    shape = ModelShape(**values)
    if shape.vocab_size < tokenizer_size:
        raise ValueError(
            f"model.vocab_size={shape.vocab_size} is smaller than the tokenizer's {tokenizer_size}: "
            "remove the setting, or set it to at least that number"
        )
    if shape.head_dim % 2:
        raise ValueError(
            f"model.head_dim={shape.head_dim} (default: d_model / n_heads) must be even, because rotary positions "
            "rotate pairs"
        )
    if shape.n_heads % shape.n_kv_heads:
        raise ValueError(f"model.n_heads={shape.n_heads} is not a multiple of model.n_kv_heads={shape.n_kv_heads}")
    return shape


def describe_shape(shape: ModelShape) -> str:
    return f"{shape.parameters():,} parameters (" + ", ".join(f"{k} {v}" for k, v in asdict(shape).items()) + ")"
