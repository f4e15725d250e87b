"""Settings of `python -m dynfocus_jax.evaluate`: the frames, prompt and answer length of each benchmark.

    --config.videomme.num_frames=128 --config.videomme.subtitles=True --config.batch_size=32

A prompt may contain {question}, {options}, {letters} ("A, B, C, or D") and {seen} ("video", or "video and
the subtitles"). `option` is the format of one line of {options}. The prompts are those that the benchmarks
publish. Multiple-choice benchmarks without one use the prompt of Video-MME.
"""

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.evaluation.configuration import benchmark_settings, evaluate_config

VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the {seen}. Respond with only "
    "the letter ({letters}) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
MLVU_PROMPT = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the "
    "best option that accurately addresses the question.\nQuestion: {question}\nOptions:\n{options}\n"
    "Only give the best option."
)


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; `arg` is ignored."""
    choice = {"prompt": VIDEOMME_PROMPT}
    # One frame per second; 200 evenly spaced frames where that gives more than 2000 (published rule).
    long_video = {"sampling": {"kind": "fps"}}
    mlvu = {"prompt": MLVU_PROMPT, "option": "({letter}) {option}", "answer_start": "Best Option: ("}
    return evaluate_config(
        msvd_qa=benchmark_settings(free_max_new_tokens=64),
        msrvtt_qa=benchmark_settings(free_max_new_tokens=64),
        activitynet_qa=benchmark_settings(free_max_new_tokens=64),
        vcgbench=benchmark_settings(),
        videomme=benchmark_settings(**choice, **long_video),
        mlvu=benchmark_settings(**mlvu, **long_video),
        mlvu_test=benchmark_settings(**mlvu, **long_video),
        lvbench=benchmark_settings(**choice, **long_video),
        videohallucer=benchmark_settings(prompt="{question}\nAnswer the question using 'yes' or 'no'."),
        mvbench=benchmark_settings(**choice),
        nextqa=benchmark_settings(**choice),
        nextgqa=benchmark_settings(**choice, max_new_tokens=32),
        vnbench=benchmark_settings(**choice, **long_video),
    )
