"""The model that lmms-eval runs its tasks with, in one process on all its devices."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from dynfocus_jax.errors import UserError

if TYPE_CHECKING:
    from dynfocus_jax.evaluation.lmms_requests import LmmsChat
    from dynfocus_jax.serving.engine import Completion

_LOG = logging.getLogger(__name__)


class DynFocus(lmms):
    """A trained model behind lmms-eval's interface for chats.

    Args:
      checkpoint: a finished run's workdir, or WORKDIR/checkpoints/STAGE/STEP.
      num_frames: frames of a video; left out, `config.generation.num_frames`.
      batch_size: questions that are read and answered together; "auto" is the most that
        `config.generation.batch` has.

    Raises:
      UserError: the checkpoint cannot be used, an argument is unknown, or there are several processes.
    """

    is_simple = False

    def __init__(
        self,
        checkpoint: str = "",
        num_frames: int | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise UserError(
                f"--model_args has the unknown field {', '.join(unknown)}; known fields: checkpoint, "
                "num_frames."
            )
        if not checkpoint:
            raise UserError("--model_args has no checkpoint; write --model_args checkpoint=DIR.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "lmms-eval was started in several processes; start one: it uses all devices of the machine."
            )
        # Not before the arguments are checked: importing JAX takes seconds and takes the accelerators.
        from dynfocus_jax.evaluation.lmms_requests import LmmsAnswerer  # noqa: PLC0415

        self._answerer = LmmsAnswerer.of(Path(str(checkpoint)), num_frames)
        is_auto = str(batch_size).startswith("auto")
        self._at_once = self._answerer.most_at_once if is_auto else int(batch_size or 1)
        self.device = torch.device("cpu")  # of the numbers that lmms-eval gathers; the model's are JAX's

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers, in order; an empty one, which is logged, where a question cannot be answered."""
        results = []
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            for start in range(0, len(requests), self._at_once):
                asked = requests[start : start + self._at_once]
                answers = self._answerer.answer([self._chat(*each) for each in enumerate(asked, start)])
                results += [self._result(*each) for each in zip(asked, answers, strict=True)]
                bar.update(len(asked))
        return results

    def _chat(self, seed: int, request: Instance) -> "LmmsChat":
        _, messages_of, settings, doc_id, task, split = request.args
        return f"{task} {doc_id}", messages_of(self.task_dict[task][split][doc_id]), settings, seed

    def _result(self, request: Instance, completion: "Completion") -> GenerationResult:
        if completion.error:
            _LOG.error("%s gets an empty answer: %s", completion.id, completion.error)
        self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), completion.text)
        read = completion.visual_tokens + completion.prompt_tokens
        counts = TokenCounts(input_tokens=read, output_tokens=len(completion.tokens))
        return GenerationResult(text=completion.text, token_counts=counts)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise UserError: the model writes answers, it does not score given ones."""
        raise UserError(
            f"{_tasks(requests)} needs log-likelihoods of given answers, which dynfocus_jax does not "
            "compute; use a generation task."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise UserError: a task's rounds are not played."""
        raise UserError(
            f"{_tasks(requests)} has several rounds, which dynfocus_jax does not support; use another task."
        )


def _tasks(requests: Sequence[Instance]) -> str:
    return f"task {', '.join(sorted({str(request.task_name) for request in requests}))}"
