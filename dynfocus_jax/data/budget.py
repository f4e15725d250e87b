"""Length budget: buckets of frames and text tokens, and the longest sequence allowed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from dynfocus_jax.errors import SampleError

ON_OVERFLOW = ("error", "drop_turns", "fewer_frames")


@dataclass(frozen=True)
class Budget:
    """The shapes that batches come in, and the number of tokens that a sample may have.

    buckets: (num_frames T, max_text Lt) of each shape; a sample goes into the smallest that holds it.
    max_length: visual and text tokens of a sample; None: whatever the bucket holds.
    on_overflow: what becomes of a sample that fits nowhere: "error": it is not used | "drop_turns": it loses
      its last turns | "fewer_frames": fewer frames are read.
    visual: bound of the visual tokens of 0, 1, ... frames, up to the most of a bucket, subtitles included.
    max_subtitle: text tokens of a video's subtitles; 0 leaves subtitles out.
    """

    buckets: tuple[tuple[int, int], ...]
    max_length: int | None = None
    on_overflow: str = "error"
    visual: tuple[int, ...] = ()
    max_subtitle: int = 0

    @classmethod
    def of(
        cls,
        buckets: Sequence[tuple[int, int]],
        visual_tokens: Callable[[int], int] = lambda frames: 0,
        max_length: int | None = None,
        on_overflow: str = "error",
        max_subtitle: int = 0,
    ) -> "Budget":
        """`visual_tokens`: a connector's bound for a number of frames (`length`)."""
        frames = range(1, 1 + max(frames for frames, _ in buckets))
        visual = (0, *(visual_tokens(count) + max_subtitle for count in frames))
        by_size = sorted(buckets, key=lambda bucket: (visual[bucket[0]] + bucket[1], *bucket))
        return cls(tuple(map(tuple, by_size)), max_length, on_overflow, visual, max_subtitle)

    @property
    def max_frames(self) -> int:
        """The most frames of a bucket."""
        return len(self.visual) - 1

    def text_room(self, frames: int, bucket: int) -> int:
        """Text tokens that a sample of the bucket may have beside the visual tokens of `frames` frames."""
        _, text = self.buckets[bucket]
        return text if self.max_length is None else min(text, self.max_length - self.visual[frames])

    def frame_room(self, text: int, bucket: int) -> int:
        """The most frames that a sample of the bucket may have beside `text` text tokens; 0: not even one."""
        frames, most_text = self.buckets[bucket]
        if text > most_text:
            return 0
        return max(
            count for count in range(frames + 1) if count == 0 or text <= self.text_room(count, bucket)
        )

    def choose(self, ends: Sequence[int], frames: int) -> int:
        """The bucket of a sample of `frames` frames.

        ends: text tokens of the sample cut after each of its turns; the last is the whole.
        Of a sample that fits nowhere as a whole it is the bucket that leaves most of it, by `on_overflow`;
        failing that one that holds its frames, so that reading it ends in the reason.
        """
        numbers = range(len(self.buckets))
        holds = [bucket for bucket in numbers if self.buckets[bucket][0] >= frames]
        for bucket in holds:
            if ends[-1] <= self.text_room(frames, bucket):
                return bucket
        if self.on_overflow == "drop_turns":
            kept = [sum(end <= self.text_room(frames, bucket) for end in ends) for bucket in holds]
            if max(kept):
                return holds[kept.index(max(kept))]
        if self.on_overflow == "fewer_frames":
            room = [min(frames, self.frame_room(ends[-1], bucket)) for bucket in numbers]
            if max(room):
                return room.index(max(room))
        return max(holds, key=lambda bucket: self.buckets[bucket][1])

    def overflow(self, text: int, frames: int, bucket: int) -> SampleError:
        """Return the error of a sample whose text and visual tokens are too long."""
        most_text = self.buckets[bucket][1]
        if text > most_text:
            return SampleError(
                f"the conversation has {text} text tokens, over the limit of {most_text}: shorten it or "
                "raise the limit"
            )
        return SampleError(
            f"{text} text tokens and up to {self.visual[frames]} visual ones of {frames} frames are over the "
            f"max_length of {self.max_length}: raise it, or choose another on_overflow"
        )


def stage_buckets(stage: ConfigDict) -> tuple[tuple[int, int], ...]:
    """Return the shapes of a stage's batches: (num_frames, max_text)."""
    return tuple(map(tuple, stage.buckets)) or ((stage.num_frames, stage.max_text),)
