"""mdmtrain: distributed pretraining of masked diffusion language models, with the variance taken out of their training."""

__version__ = "0.1.0"
