"""dynfocus_jax: token-efficient video language models in JAX."""

__version__ = "0.2.0.dev0"
