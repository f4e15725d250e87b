"""Comparison of a PyTorch module with ours: weights and gradients in our tree, outputs, tolerances."""

import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file

from dynfocus_jax import trees
from dynfocus_jax.weights.merge import load_part


def perturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Set all parameters to random values, biases and norms included, so that each affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise *= 1.5 / parameter[0].numel() ** 0.5
            else:
                noise = 0.3 * noise + (1 if name.endswith("weight") else 0)
            parameter.copy_(noise)
    return module.eval()


def published(module: torch.nn.Module, gradients: bool = False, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return weights (or their gradients) by published name; tied weights once, under the first name."""
    named = module.named_parameters()
    if gradients:
        named = ((name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in named)
    return {prefix + name: value.detach().clone().contiguous() for name, value in named}


def read(tensors: dict[str, torch.Tensor], target: dict, **options) -> dict:
    """Return our parameters, read from a file with these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(tensors, file)
        return load_part(file, target, say=lambda line: None, **options)


def shapes_of(module, *arguments, **options) -> dict:
    """Return the shapes and dtypes of a module's parameters."""
    return jax.eval_shape(lambda key: module.init(key, *arguments, **options), jax.random.key(0))["params"]


def cut(params: dict, depth: int) -> dict:
    """Return the parameters with the first `depth` of the stacked layers."""
    return params | {"blocks": jax.tree.map(lambda leaf: leaf[:depth], params["blocks"])}


def value_and_gradients(function, cotangent, *arguments):
    """Compute `function(*arguments)` and the gradients of its product with the cotangent."""

    @jax.jit
    def run(*arguments):
        value, pullback = jax.vjp(function, *arguments)
        return value, *pullback(jnp.asarray(cotangent, value.dtype))

    return jax.device_get(run(*arguments))


def assert_close(actual, expected, what: str, tolerance: float = 1e-5, scale: float = 0.0) -> None:
    """Check the largest error relative to the largest expected magnitude, or to `scale` if that is larger."""
    if isinstance(expected, torch.Tensor):
        expected = expected.detach().numpy()
    assert actual.shape == expected.shape, what
    scale = max(np.abs(expected).max(), scale)
    assert scale > 0, f"{what}: nothing to compare"
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / scale
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_gradients_close(actual: dict, expected: dict, unused: str = "nothing") -> None:
    """Compare the gradients of all weights.

    unused: pattern of weights whose gradient is zero, besides keys' biases, which a softmax cancels.
    """
    actual, expected = trees.flatten(actual), trees.flatten(expected)
    assert actual.keys() == expected.keys()
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in expected.items():
        assert_close(actual[path], leaf, f"gradient of {path}", tolerance=5e-5, scale=1e-2 * largest)
    silent = {path for path, leaf in expected.items() if np.abs(leaf).max() < 1e-4 * largest}
    assert all(re.fullmatch(rf".*key/bias|{unused}", path) for path in silent), silent
