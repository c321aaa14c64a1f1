"""mdmtrain: distributed pretraining of masked diffusion language models, with little variance."""

__version__ = "0.1.0"
