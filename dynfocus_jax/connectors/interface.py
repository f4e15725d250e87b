"""The interface of connectors: the base class, what goes in and what comes out.

To add a method, subclass `Connector` in a file of its own (`connectors/NAME.py` with `CONNECTOR =
MyConnector` at its end, or any module outside of the package) and set `config.model.connector.kind = "NAME"`
or `"my_module:MyConnector"`. Nothing else in the package knows the methods by name. CONTRIBUTING.md walks
through an example.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key
from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.models.layers import Dtype
from dynfocus_jax.ops.packing import pack_frames
from dynfocus_jax.published_names import Family, own_names
from dynfocus_jax.sections import Section


class Dimensions(NamedTuple):
    """Static sizes that a connector works with."""

    grid: tuple[int, int]  # patches of a frame, rows and columns; N is their product
    vision_width: int  # C
    language_width: int  # D


class QuestionWords(NamedTuple):
    """The question's words, embedded by the text encoder's word embeddings."""

    words: Float[Array, "B Lq E"]
    length: Int32[Array, " B"]


class Subtitles(NamedTuple):
    """Embedded subtitle tokens, each placed behind the visual tokens of its frame."""

    tokens: Float[Array, "B S D"]
    frames: Int32[Array, "B S"]  # ascending, then -1 for padding


class Randomness(NamedTuple):
    """Sources of randomness in training; evaluation has none and is deterministic.

    keys: one PRNG key per row, so that a row draws the same values in whatever microbatch it is.
    select_at_random: True while a stage selects at random (`stage.random_steps`).
    given: values by name that are used instead of drawing them (tests, reproducing published runs).
    """

    keys: Key[Array, " B"]
    select_at_random: Bool[Array, ""]
    given: Mapping[str, jax.Array] = {}


class ConnectorInputs(NamedTuple):
    """Everything that a connector may read. Optional inputs are None unless the connector asks for them."""

    features: Float[Array, "B T N C"]  # patch features of the vision tower, without its class token
    frame_mask: Bool[Array, "B T"]  # True for frames that exist; they come first
    text_queries: Float[Array, "B T Q C"] | None = (
        None  # with `needs_text_queries`: the text encoder's output
    )
    question: QuestionWords | None = None  # with `needs_question`
    oracle_frames: Bool[Array, "B T"] | None = None  # frames known to matter, where the data names them
    subtitles: Subtitles | None = None  # not to be encoded, only packed: see `Connector.pack`
    randomness: Randomness | None = None


class Focus(NamedTuple):
    """Frames that a connector gives most tokens to, in the same form for the pictures of all methods."""

    frames: Int32[Array, "B J"]  # chosen frames
    valid: Bool[Array, "B J"]  # slots that are in use
    candidates: Bool[Array, "B T"]  # frames that could have been chosen
    scores: Float[Array, "B T"]  # importance of each frame, 0 on padding
    tokens: Int32[Array, "B T"]  # visual tokens spent on each frame, 0 on padding


class VisualTokens(NamedTuple):
    """Visual tokens of a batch, packed to the left, with subtitle tokens between them."""

    tokens: Float[Array, "B L D"]  # zero on padding
    mask: Bool[Array, "B L"]
    count: Int32[Array, " B"]  # valid tokens of each row, at most L
    focus: Focus | None = None  # None for a method that treats all frames alike


class Connector(nn.Module):
    """Base class of connectors: a subclass sets FIELDS, and defines `length` and `__call__`.

    settings: the section `config.model.connector`, with the fields of FIELDS and `kind`.
    """

    settings: FrozenConfigDict
    dimensions: Dimensions
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    FIELDS: ClassVar[Section] = {}
    """Settings of the method, with defaults, allowed values and meanings."""

    SHARDING: ClassVar[tuple[tuple[str, tuple[str | None, ...]], ...]] = ()
    """(regular expression, mesh axes of the last dimensions) pairs over parameter paths below "connector/".
    A parameter that none matches is replicated."""

    PUBLISHED: ClassVar[Mapping[str, Family]] = {}
    """Tables of published names by family: reading prefers the first that fits, export writes the last.
    Without any, the parameters are published under their own paths."""

    TRAINABLE: ClassVar[tuple[str, ...]] = ("connector/.*",)
    """What a stage trains that does not say: regular expressions over parameter paths of the whole model."""

    @classmethod
    def check(cls, settings: ConfigDict, model: ConfigDict, where: str) -> None:
        """Check what FIELDS cannot express; raise UserError with the field's name, which begins with `where`.

        model: the section `config.model`, of which only the sizes of the other parts are meant to be read.
        """

    @classmethod
    def families(cls, paths: Iterable[str]) -> Mapping[str, Family]:
        """Return the tables of published names; without any, the one of the parameters' own paths."""
        return cls.PUBLISHED or {"own_names": own_names("connector", cls.__name__, paths)}

    @property
    def needs_text_queries(self) -> bool:
        """Whether `ConnectorInputs.text_queries` is read: the model then has a text encoder."""
        return False

    @property
    def needs_question(self) -> bool:
        """Whether `ConnectorInputs.question` is read: the model then has a text encoder."""
        return False

    def length(self, frames: int) -> int:
        """Return the static number of visual tokens of at most `frames` frames, subtitles excluded."""
        raise NotImplementedError

    def __call__(self, inputs: ConnectorInputs, *, train: bool = False) -> VisualTokens:
        """Encode a batch of clips; `tokens` has `length(T)` tokens, plus those of the subtitles."""
        raise NotImplementedError

    def pack(self, tokens: Float[Array, "B T P D"], inputs: ConnectorInputs) -> VisualTokens:
        """Pack P tokens of every valid frame in time order, with the subtitles between them."""
        batch, time, _, width = tokens.shape
        no_tokens = jnp.zeros((batch, 0, 0, width), tokens.dtype)
        no_slots = jnp.zeros((batch, 0), jnp.int32)
        length = self.length(time) + num_subtitles(inputs)
        packed = pack_frames(
            tokens, no_tokens, no_slots, inputs.frame_mask, no_slots.astype(bool), length, inputs.subtitles
        )
        return VisualTokens(*packed)


def num_subtitles(inputs: ConnectorInputs) -> int:
    """Return S, the static number of subtitle tokens of a row."""
    return 0 if inputs.subtitles is None else inputs.subtitles.tokens.shape[1]


def check_output(visual: VisualTokens, inputs: ConnectorInputs, connector: Connector) -> None:
    """Check the shapes of a connector's output against the interface; raise UserError if they differ.

    Runs while the model is traced, so it costs nothing in a compiled step.
    """
    kind = f"connector {connector.settings.kind!r}"
    if not isinstance(visual, VisualTokens):
        raise UserError(f"{kind} returned {type(visual).__name__}, expected VisualTokens.")
    batch, time = inputs.frame_mask.shape
    length = connector.length(time) + num_subtitles(inputs)
    expected = {
        "tokens": (batch, length, connector.dimensions.language_width),
        "mask": (batch, length),
        "count": (batch,),
    }
    for name, shape in expected.items():
        found = getattr(visual, name).shape
        if found != shape:
            raise UserError(
                f"{kind} returned {name} of shape {found}, expected {shape}: its length({time}) is "
                f"{connector.length(time)}, and there are {num_subtitles(inputs)} subtitle tokens."
            )
    if visual.focus is None:
        return
    if not isinstance(visual.focus, Focus):
        raise UserError(
            f"{kind} returned a focus of type {type(visual.focus).__name__}, expected Focus or None."
        )
    for name in ("candidates", "scores", "tokens"):
        found = getattr(visual.focus, name).shape
        if found != (batch, time):
            raise UserError(f"{kind} returned focus.{name} of shape {found}, expected {(batch, time)}.")
    slots = visual.focus.frames.shape
    if len(slots) != 2 or slots[0] != batch or visual.focus.valid.shape != slots:
        raise UserError(
            f"{kind} returned focus.frames of shape {slots} and focus.valid of shape "
            f"{visual.focus.valid.shape}, expected two equal shapes ({batch}, J)."
        )
