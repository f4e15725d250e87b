"""Settings of `python -m dynfocus_jax.evaluate`: the frames, prompt and answer length of each benchmark.

    --config.videomme.num_frames=128 --config.videomme.subtitles=True --config.batch_size=32

A prompt may contain {question}, {options}, {letters} ("A, B, C, or D") and {seen} ("video", or "video and
the subtitles"). `option` is the format of one line of {options}. The prompts are those that the benchmarks
publish, declared in their modules (dynfocus_jax/evaluation/benchmarks/). Multiple-choice benchmarks without
one use the prompt of Video-MME.
"""

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.evaluation.configuration import evaluate_config


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; `arg` is ignored."""
    return evaluate_config()
