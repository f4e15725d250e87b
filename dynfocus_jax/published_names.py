"""Published names of parameters: the table of one kind of checkpoint, and the parts that tables consist of.

A rule works in both directions. `{layer}` in the published name is the number of the layer: in our path it
is either the leading axis of a stacked leaf, or part of the path. `{part}` in our path makes one published
tensor fill several leaves (query, key and value). The layout is an einops pattern from the published to our
axes, without the layer axis of a stacked leaf. Row, column and channel are those of a square RGB patch.

A leaf: backbones (`weights/tables.py`) and connectors (`connectors/`) declare their tables with it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PARTS = ("vision", "text_encoder", "language", "connector", "query_projection")
FUSED = ("query", "key", "value")  # what `{part}` stands for, in the order of fused weights


class Rule(NamedTuple):
    """A published name, our path below the part, the layout (None: the same) and whether models may lack it.

    `unless`: why the weight is left out when the model has no such parameter; None makes that an error.
    """

    name: str
    path: str
    layout: str | None = None
    unless: str | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """Table of the published names of one part of the model in one kind of checkpoint.

    Attributes:
      part: one of `PARTS`.
      title: for messages.
      prefix: regular expression of what may stand before every name (repeatedly), e.g. `model\\.`.
      rules: in the order of the network.
      zeros: our leaves that are zero by definition and not stored.
      lacks: regular expressions of our leaves that such checkpoints never hold.
      ignored: regular expression of published names -> why they are left out.
      spare_layers: layers that published files hold beyond those of the network.
    """

    part: str
    title: str
    prefix: str
    rules: tuple[Rule, ...]
    zeros: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    spare_layers: int = 0
    _compiled: list[tuple[re.Pattern, Rule]] = field(init=False, repr=False)
    _ignored: list[tuple[re.Pattern, str]] = field(init=False, repr=False)

    def __post_init__(self):
        compiled = [
            (re.compile(f"(?:{self.prefix})*{_pattern(rule.name, self.prefix)}"), rule) for rule in self.rules
        ]
        ignored = [
            (re.compile(f"(?:{self.prefix})*(?:{pattern})"), why) for pattern, why in self.ignored.items()
        ]
        object.__setattr__(self, "_compiled", compiled)
        object.__setattr__(self, "_ignored", ignored)

    def match(self, name: str) -> tuple[Rule, int | None] | None:
        """Return the rule of a published name, and the number of the layer in it."""
        for pattern, rule in self._compiled:
            found = pattern.fullmatch(name)
            if found:
                return rule, int(found["layer"]) if "layer" in pattern.groupindex else None
        return None

    def is_lacking(self, path: str) -> bool:
        """Whether such checkpoints never hold one of our leaves."""
        return any(re.fullmatch(pattern, path) for pattern in self.lacks)

    def reason_to_ignore(self, name: str) -> str | None:
        """Return the reason why the table leaves a published name out; None if it does not."""
        return next((why for pattern, why in self._ignored if pattern.fullmatch(name)), None)


def _pattern(name: str, prefix: str) -> str:
    """Return the regular expression of a published name, without the prefix it is exported with."""
    bare = re.sub(rf"^(?:{prefix})*", "", name) if prefix else name
    return re.escape(bare).replace(r"\{layer\}", r"(?P<layer>\d+)")


# --- Building blocks of tables ------------------------------------------------------------------------

DENSE = "output input -> input output"
HEADS = "(head dim) width -> width head dim"  # of query, key, value
HEADS_BIAS = "(head dim) -> head dim"
MERGE = "width (head dim) -> head dim width"  # of the output projection


def linear(name: str, path: str, layout: str = DENSE, bias: str | None = None) -> tuple[Rule, ...]:
    """Return the rules of a linear layer with a bias."""
    return Rule(f"{name}.weight", f"{path}/kernel", layout), Rule(f"{name}.bias", f"{path}/bias", bias)


def norm(name: str, path: str, unless: str | None = None) -> tuple[Rule, ...]:
    """Return the rules of a LayerNorm."""
    weight, bias = (name + ".weight", f"{path}/scale"), (name + ".bias", f"{path}/bias")
    return Rule(*weight, unless=unless), Rule(*bias, unless=unless)


def own_names(part: str, title: str, paths: Iterable[str]) -> Family:
    """Return the table that publishes parameters under their own paths, with dots for slashes."""
    rules = tuple(Rule(path.replace("/", "."), path) for path in sorted(paths))
    return Family(part, f"{title} (its own names)", "", rules)
