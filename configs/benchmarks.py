"""Settings of `python -m dynfocus_jax.evaluate`: the frames, prompt and answer length of each benchmark.

    --config.videomme.num_frames=128 --config.videomme.subtitles=True --config.batch_size=32

A prompt may contain {question}, {options}, {letters} ("A, B, C, or D") and {seen} ("video", or "video and
the subtitles"). `option` is the format of one line of {options}. The prompts are those that the benchmarks
publish. Multiple-choice benchmarks without one use the prompt of Video-MME.
"""

from typing import Any

from ml_collections.config_dict import ConfigDict, placeholder

VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the {seen}. Respond with only "
    "the letter ({letters}) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
MLVU_PROMPT = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the "
    "best option that accurately addresses the question.\nQuestion: {question}\nOptions:\n{options}\n"
    "Only give the best option."
)
SPAN_PROMPT = (
    "{question}\nAnswer with the seconds from which and to which it is seen, as: from 1.5 to 4.0 seconds."
)


def benchmark_settings(**changes: Any) -> ConfigDict:
    """Return the settings of one benchmark: the defaults with `changes`."""
    settings = ConfigDict(
        {
            "num_frames": placeholder(int),  # at most; None: as many as in the model's own evaluation
            "sampling": {"kind": "uniform", "fps": 1.0, "cap": 2000, "above": 200, "pick": "middle"},
            "prompt": "{question}",
            "option": "{letter}. {option}",
            "answer_start": "",  # first words of the answer, given to the model
            "free_prompt": "{question}",  # prompt of open-ended questions in benchmarks that have both kinds
            "when_prompt": SPAN_PROMPT,  # prompt of questions that ask for a time span
            "guidance": "{question}",  # input of the text encoder
            "subtitles": False,  # whether the prompt includes the subtitles shown at the sampled frames
            "max_new_tokens": 16,
            "free_max_new_tokens": 512,  # max_new_tokens of open-ended questions
        }
    )
    settings.update(changes)
    return settings


def get_config(arg: str = "") -> ConfigDict:
    """Return the configuration; `arg` is ignored."""
    config = ConfigDict()
    choice = {"prompt": VIDEOMME_PROMPT}
    # One frame per second; 200 evenly spaced frames where that gives more than 2000 (published rule).
    long_video = {"sampling": {"kind": "fps"}}
    mlvu = {"prompt": MLVU_PROMPT, "option": "({letter}) {option}", "answer_start": "Best Option: ("}
    config.msvd_qa = benchmark_settings(free_max_new_tokens=64)
    config.msrvtt_qa = benchmark_settings(free_max_new_tokens=64)
    config.activitynet_qa = benchmark_settings(free_max_new_tokens=64)
    config.vcgbench = benchmark_settings()
    config.videomme = benchmark_settings(**choice, **long_video)
    config.mlvu = benchmark_settings(**mlvu, **long_video)
    config.mlvu_test = benchmark_settings(**mlvu, **long_video)
    config.lvbench = benchmark_settings(**choice, **long_video)
    config.videohallucer = benchmark_settings(prompt="{question}\nAnswer the question using 'yes' or 'no'.")
    config.mvbench = benchmark_settings(**choice)
    config.nextqa = benchmark_settings(**choice)
    config.nextgqa = benchmark_settings(**choice, max_new_tokens=32)
    config.vnbench = benchmark_settings(**choice, **long_video)

    config.batch_size = 16  # questions answered together
    config.threads = 2  # threads that decode videos ahead of time
    config.judge = ConfigDict(
        {
            "model": placeholder(str),  # name of the model at the endpoint; None: no judge
            "base_url": "https://api.openai.com/v1",  # URL of any OpenAI-compatible endpoint
            "key_variable": "OPENAI_API_KEY",  # environment variable with the API key; "": no key is needed
            "concurrency": 8,  # requests in flight
            "timeout": 60.0,  # seconds without data after which an attempt is aborted
            "attempts": 16,  # attempts per question
            "parameters": ConfigDict({"temperature": 0.0, "max_tokens": 1024}),  # sent unchanged
        }
    )
    # Devices of each process per axis; -1 takes the remaining ones. Every process holds the whole model.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})
    # Start-up of several processes, which divide the questions; same fields as for training.
    config.distributed = ConfigDict(
        {
            "mode": "none",
            "address": placeholder(str),
            "num_processes": placeholder(int),
            "process_id": placeholder(int),
            "timeout": 60,
        }
    )
    return config.lock()
