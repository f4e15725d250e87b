"""dynfocus_jax: token-efficient video language models in JAX."""
