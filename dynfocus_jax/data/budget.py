"""Length budget: the buckets of frames and text tokens, and the longest sequence allowed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from dynfocus_jax.errors import SampleError

ON_OVERFLOW = ("error", "drop_turns", "fewer_frames")

Bucket = tuple[int, int]  # number of frames T, number of text tokens Lt


@dataclass(frozen=True)
class Budget:
    """Shapes of batches, and the number of tokens that a sample may have.

    Attributes:
      buckets: shapes of batches, smallest first. A sample goes into the first one that holds it.
      max_length: largest number of visual and text tokens of a sample; None allows what the bucket holds.
      on_overflow: treatment of a sample that does not fit: "error" skips it, "drop_turns" drops its last
        turns, "fewer_frames" reads fewer frames.
      visual_tokens: largest number of visual tokens of 0, 1, ... frames, up to the most frames of a bucket,
        subtitles included.
      max_subtitle: largest number of text tokens of a video's subtitles; 0 leaves subtitles out.
    """

    buckets: tuple[Bucket, ...]
    max_length: int | None = None
    on_overflow: str = "error"
    visual_tokens: tuple[int, ...] = ()
    max_subtitle: int = 0

    @classmethod
    def from_buckets(
        cls,
        buckets: Sequence[Bucket],
        count_visual_tokens: Callable[[int], int] = lambda frames: 0,
        max_length: int | None = None,
        on_overflow: str = "error",
        max_subtitle: int = 0,
    ) -> "Budget":
        """Return the budget of buckets in any order.

        Args:
          buckets: the shapes of batches.
          count_visual_tokens: returns the largest number of visual tokens of a number of frames, subtitles
            excluded: a connector's `length`.
          max_length, on_overflow, max_subtitle: see the attributes.
        """
        frames = range(1, 1 + max(frames for frames, _ in buckets))
        visual = (0, *(count_visual_tokens(count) + max_subtitle for count in frames))
        by_size = sorted(buckets, key=lambda bucket: (visual[bucket[0]] + bucket[1], *bucket))
        ordered = tuple((num_frames, max_text) for num_frames, max_text in by_size)
        return cls(ordered, max_length, on_overflow, visual, max_subtitle)

    @property
    def max_frames(self) -> int:
        """Number of frames of the bucket that has the most."""
        return len(self.visual_tokens) - 1

    def text_room(self, frames: int, bucket: int) -> int:
        """Return the largest number of text tokens of a sample with a number of frames in a bucket."""
        _, max_text = self.buckets[bucket]
        return (
            max_text
            if self.max_length is None
            else min(max_text, self.max_length - self.visual_tokens[frames])
        )

    def frame_room(self, text: int, bucket: int) -> int:
        """Return the largest number of frames of a sample with `text` tokens of text in a bucket, or 0."""
        num_frames, max_text = self.buckets[bucket]
        if text > max_text:
            return 0
        return max(
            count for count in range(num_frames + 1) if count == 0 or text <= self.text_room(count, bucket)
        )

    def choose_bucket(self, ends: Sequence[int], frames: int) -> int:
        """Return the bucket of a sample.

        The bucket is the smallest one that holds the whole sample. If there is none, it is the one that keeps
        most of the sample under `on_overflow`. If nothing can be kept, it is one that holds the frames, and
        loading the sample raises the reason.

        Args:
          ends: text tokens of the sample up to the end of each of its turns; the last is the whole text.
          frames: number of frames of the sample.
        """
        numbers = range(len(self.buckets))
        large_enough = [bucket for bucket in numbers if self.buckets[bucket][0] >= frames]
        for bucket in large_enough:
            if ends[-1] <= self.text_room(frames, bucket):
                return bucket
        if self.on_overflow == "drop_turns":
            kept = [sum(end <= self.text_room(frames, bucket) for end in ends) for bucket in large_enough]
            if max(kept):
                return large_enough[kept.index(max(kept))]
        if self.on_overflow == "fewer_frames":
            room = [min(frames, self.frame_room(ends[-1], bucket)) for bucket in numbers]
            if max(room):
                return room.index(max(room))
        return max(large_enough, key=lambda bucket: self.buckets[bucket][1])

    def overflow_error(self, text: int, frames: int, bucket: int) -> SampleError:
        """Return the error for a sample with too many text and visual tokens."""
        _, max_text = self.buckets[bucket]
        if text > max_text:
            return SampleError(
                f"the conversation has {text} text tokens, expected at most {max_text}; shorten it, or raise "
                "max_text"
            )
        return SampleError(
            f"{text} text tokens and up to {self.visual_tokens[frames]} visual tokens of {frames} frames are "
            f"more than max_length = {self.max_length}; raise max_length, or use another on_overflow"
        )


def stage_buckets(stage: ConfigDict) -> tuple[Bucket, ...]:
    """Return the shapes of a stage's batches: (num_frames, max_text)."""
    return tuple((frames, text) for frames, text in stage.buckets) or ((stage.num_frames, stage.max_text),)
