"""The model class that lmms-eval loads. It runs in one process, on all devices of the machine."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]  (an optional dependency)
    GenerationResult,
    Instance,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]  (an optional dependency)
from tqdm import tqdm

from dynfocus_jax.errors import UserError

if TYPE_CHECKING:
    from dynfocus_jax.evaluation.lmms_requests import LmmsChat
    from dynfocus_jax.serving.engine import Completion

_LOG = logging.getLogger(__name__)


class DynFocus(lmms):
    """A trained model with lmms-eval's interface for chats.

    Args:
      checkpoint: a finished run's workdir, or WORKDIR/checkpoints/STAGE/STEP.
      num_frames: frames of a video; None: `config.generation.num_frames`.
      batch_size: questions that are answered together; "auto": the largest batch of
        `config.generation.batch`.

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
                f"--model_args has unknown fields: {', '.join(unknown)}, expected checkpoint and num_frames "
                "only."
            )
        if not checkpoint:
            raise UserError("--model_args has no checkpoint; use --model_args checkpoint=DIR.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "lmms-eval runs in several processes, expected one; start a single process, which uses all "
                "devices of the machine."
            )
        # After the arguments are checked, because importing JAX takes seconds and occupies the accelerators
        from dynfocus_jax.evaluation.lmms_requests import LmmsAnswerer  # noqa: PLC0415

        self._answerer = LmmsAnswerer.load(Path(str(checkpoint)), num_frames)
        is_auto = str(batch_size).startswith("auto")
        self._batch_size = self._answerer.max_batch_size if is_auto else int(batch_size or 1)
        self.device = torch.device("cpu")  # of the tensors that lmms-eval gathers

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return the answers, in order; an empty one, with a line in the log, if a question fails."""
        results = []
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            for start in range(0, len(requests), self._batch_size):
                batch = requests[start : start + self._batch_size]
                answers = self._answerer.answer([self._chat(*each) for each in enumerate(batch, start)])
                results += [self._result(*each) for each in zip(batch, answers, strict=True)]
                bar.update(len(batch))
        return results

    def _chat(self, seed: int, request: Instance) -> "LmmsChat":
        _, messages_of, settings, doc_id, task, split = request.args
        return f"{task} {doc_id}", messages_of(self.task_dict[task][split][doc_id]), settings, seed

    def _result(self, request: Instance, completion: "Completion") -> GenerationResult:
        if completion.error:
            _LOG.error("%s: empty answer (%s)", completion.id, completion.error)
        self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), completion.text)
        num_input = completion.visual_tokens + completion.prompt_tokens
        counts = TokenCounts(input_tokens=num_input, output_tokens=len(completion.tokens))
        return GenerationResult(text=completion.text, token_counts=counts)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raise UserError: the model does not compute the likelihood of given answers."""
        raise UserError(
            f"{_tasks(requests)} needs log-likelihoods of given answers, which are not supported; use a "
            "generation task."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raise UserError: tasks of several rounds are not supported."""
        raise UserError(f"{_tasks(requests)} has several rounds, which are not supported; use another task.")


def _tasks(requests: Sequence[Instance]) -> str:
    return f"task {', '.join(sorted({str(request.task_name) for request in requests}))}"
