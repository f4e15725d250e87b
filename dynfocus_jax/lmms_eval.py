"""The entry point of lmms-eval's plugins: makes the model `dynfocus_jax` known to it.

    pip install '.[lmms-eval]'
    lmms-eval --model dynfocus_jax --model_args checkpoint=runs/instruct --tasks videomme --batch_size 4

lmms-eval loads this whichever model it runs: neither JAX nor the model is imported here.
"""


def manifest():
    """Return the manifest that lmms-eval asks plugins for: the model's names and the class to import."""
    from lmms_eval.models.registry_v2 import ModelManifest  # noqa: PLC0415 (an optional dependency)

    return ModelManifest(
        model_id="dynfocus_jax",
        chat_class_path="dynfocus_jax.evaluation.lmms_model.DynFocus",
        aliases=("dynfocus",),
    )
