"""Train language models to explain their own computations, and measure how faithful the explanations are."""

__version__ = "0.1.0"
