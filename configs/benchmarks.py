"""How `python -m dynfocus_jax.evaluate` asks each benchmark: frames, prompt, length of the answer.

    --config.videomme.num_frames=128 --config.videomme.subtitles=True --config.batch_size=32

{question}, {options} and {letters} ("A, B, C, or D") in a prompt are those of the question, {seen} is "video"
or "video and the subtitles"; `option` is the form of each option. The prompts are the benchmarks' own, or
Video-MME's, which is the common one for multiple choice.
"""

from ml_collections.config_dict import ConfigDict, placeholder

CHOICE = (
    "Select the best answer to the following multiple-choice question based on the {seen}. Respond with only "
    "the letter ({letters}) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
MLVU = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the "
    "best option that accurately addresses the question.\nQuestion: {question}\nOptions:\n{options}\n"
    "Only give the best option."
)
WHEN = "{question}\nAnswer with the seconds from which and to which it is seen, as: from 1.5 to 4.0 seconds."


def asked(**changes):
    """The fields of a benchmark."""
    fields = ConfigDict(
        {
            "num_frames": placeholder(int),  # at most; None: as many as the model's own evaluation
            "sampling": {"kind": "uniform", "fps": 1.0, "cap": 2000, "above": 200, "pick": "middle"},
            "prompt": "{question}",
            "option": "{letter}. {option}",
            "answer_start": "",  # what the answer is made to begin with
            "free_prompt": "{question}",  # of questions without options, in a benchmark that has both
            "when_prompt": WHEN,  # of questions for a span of time
            "guidance": "{question}",  # what the text encoder reads
            "subtitles": False,  # whether those on the screen at the chosen frames are read out
            "max_new_tokens": 16,
            "free_max_new_tokens": 512,  # of questions without options
        }
    )
    fields.update(changes)
    return fields


def get_config(arg: str = ""):
    config = ConfigDict()
    choice = {"prompt": CHOICE}
    hours = {"sampling": {"kind": "fps"}}  # one frame a second, of more than 2000 frames 200 (published rule)
    mlvu = {"prompt": MLVU, "option": "({letter}) {option}", "answer_start": "Best Option: ("}
    config.msvd_qa = asked(free_max_new_tokens=64)
    config.msrvtt_qa = asked(free_max_new_tokens=64)
    config.activitynet_qa = asked(free_max_new_tokens=64)
    config.vcgbench = asked()
    config.videomme = asked(**choice, **hours)
    config.mlvu = asked(**mlvu, **hours)
    config.mlvu_test = asked(**mlvu, **hours)
    config.lvbench = asked(**choice, **hours)
    config.videohallucer = asked(prompt="{question}\nAnswer the question using 'yes' or 'no'.")
    config.mvbench = asked(**choice)
    config.nextqa = asked(**choice)
    config.nextgqa = asked(**choice, max_new_tokens=32)
    config.vnbench = asked(**choice, **hours)

    config.batch_size = 16  # questions that are answered together
    config.threads = 2  # that read videos ahead
    config.judge = ConfigDict(
        {
            "model": placeholder(str),  # as its endpoint calls it; None: no judge
            "base_url": "https://api.openai.com/v1",  # of any OpenAI-compatible endpoint
            "key_variable": "OPENAI_API_KEY",  # the environment variable with the key; "" where there is none
            "concurrency": 8,  # requests in flight
            "timeout": 60.0,  # seconds without data that end an attempt
            "attempts": 16,  # per question
            "parameters": ConfigDict({"temperature": 0.0, "max_tokens": 1024}),  # sent as they are
        }
    )
    # Devices of each process on each axis, -1 takes what is left: every process has the whole model.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})
    # How processes that share the questions find each other, as for training
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
