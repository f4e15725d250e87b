"""The plugin of lmms-eval, which registers the model `dynfocus_jax`.

    pip install '.[lmms-eval]'
    lmms-eval --model dynfocus_jax --model_args checkpoint=runs/instruct --tasks videomme --batch_size 4

lmms-eval imports this module whatever model it runs, so neither JAX nor the model is imported here.
"""

from typing import TYPE_CHECKING

# lmms-eval is an optional dependency, which pyright may not find
if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]


def manifest() -> "ModelManifest":
    """Return the manifest of the plugin: the model's names and the path of its class."""
    from lmms_eval.models import registry_v2  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    return registry_v2.ModelManifest(
        model_id="dynfocus_jax",
        chat_class_path="dynfocus_jax.evaluation.lmms_model.DynFocus",
        aliases=("dynfocus",),
    )
