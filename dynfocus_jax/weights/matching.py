"""Matching of published names with our parameters: the place of each weight, or why it is left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dynfocus_jax.errors import UserError
from dynfocus_jax.published_names import FUSED, PARTS, Family, Rule
from dynfocus_jax.weights.layout import published_shape
from dynfocus_jax.weights.tables import FAMILIES, TIED


@dataclass(frozen=True)
class Slot:
    """The place of a published weight in our parameters.

    Attributes:
      rule: the table's rule for the weight.
      paths: the parameters it fills; several for a fused weight.
      layer: index on their first axis; None if they are not stacked.
      shape: shape in our layout; the first axis of a fused weight runs over `paths`.
    """

    rule: Rule
    paths: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def is_fused(self) -> bool:
        return "{part}" in self.rule.path

    @property
    def published_shape(self) -> tuple[int, ...]:
        return published_shape(self.rule.layout, self.shape)


@dataclass
class Mismatches:
    """Everything that does not fit between a file and the model; true if there is any.

    Attributes:
      missing: published names of parameters that the file does not fill.
      unexpected: published names without a parameter.
      unnamed: our paths that have no published name in the family.
      shapes: sentences about weights of a wrong shape.
      others: sentences about other mismatches.
      hints: sentences about a likely cause.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.unnamed or self.shapes or self.others)

    def lines(self) -> list[str]:
        """Return one line per kind of mismatch, with every name, and then the sentences."""
        groups = (
            ("missing", self.missing, ", "),
            ("unexpected", self.unexpected, ", "),
            ("model parameters without a published name", self.unnamed, ", "),
            ("mis-shaped", self.shapes, "; "),
        )
        named = [
            f"{len(names)} {kind}: {separator.join(collapse_numbers(names))}"
            for kind, names, separator in groups
            if names
        ]
        return [*named, *self.others, *self.hints]


@dataclass
class Matching:
    """The published names of a file, matched with our parameters.

    Attributes:
      slots: published name -> its place.
      tied_head: published name of a head that must equal the embedding, if the file has one.
      absent: our paths that the file does not hold and need not hold.
      zeros: our paths whose values are zero by definition.
      left_out: reason -> published names that are left out.
      used_skips: patterns of `skip` that matched a name.
      mismatches: everything that does not fit.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    tied_head: str | None = None
    absent: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    used_skips: set[str] = field(default_factory=set)
    mismatches: Mismatches = field(default_factory=Mismatches)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(name)


def match_names(
    table: Family,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    skip: Sequence[str] = (),
    depth: int | None = None,
) -> Matching:
    """Match published names with the parameters of one part of the model.

    Args:
      table: the family's table of names.
      names: published names in the file.
      shapes: {our path: shape} of the part.
      skip: regular expressions of published names to leave out, matched in full.
      depth: layers of the published network, if our part leaves out its last ones.
    """
    matching = Matching()
    mismatches = matching.mismatches
    built = num_layers(shapes)
    matches = {name: table.match(name) for name in names}
    published = 1 + max(
        (found[1] for found in matches.values() if found and found[1] is not None), default=-1
    )
    has_known_surplus = published > built and published in {
        count + spare for count in (built, depth or built) for spare in (0, table.spare_layers)
    }

    detected = [other for other in detect_families(names) if other.part != table.part]
    filled: dict[tuple[str, int | None], str] = {}  # (our path, layer) -> published name
    dropped: set[tuple[str, int | None]] = set()
    for name, found in matches.items():
        slot = found and find_slot(*found, shapes)
        patterns = {pattern for pattern in skip if re.fullmatch(pattern, name)}
        if patterns:
            matching.used_skips |= patterns
            matching.leave_out(name, "matches config.weights.skip")
            dropped |= {(path, slot.layer) for path in slot.paths} if slot else set()
        elif slot:
            twins = {filled[path, slot.layer] for path in slot.paths if (path, slot.layer) in filled}
            if twins:
                mismatches.others.append(f"{name} and {', '.join(twins)} fill the same parameter.")
            filled |= {(path, slot.layer): name for path in slot.paths}
            matching.slots[name] = slot
        elif found and found[1] is not None and found[1] >= built and has_known_surplus:
            matching.leave_out(name, f"the model uses the first {built} of the file's {published} layers")
        elif found and found[0].unless == TIED:
            matching.tied_head = name
            matching.leave_out(name, TIED)
        elif found and found[0].unless:
            matching.leave_out(name, found[0].unless)
        elif reason := table.reason_to_ignore(name):
            matching.leave_out(name, reason)
        elif not found and (other := _other_part(name, table.part, detected)):
            matching.leave_out(name, f"belongs to the {other}")
        else:
            mismatches.unexpected.append(name)

    for path, shape in shapes.items():
        rule = next((rule for rule in table.rules if _path_pattern(rule).fullmatch(path)), None)
        stacked = rule is not None and "{layer}" in rule.name and "{layer}" not in rule.path
        places = [(path, layer) for layer in (range(shape[0]) if stacked else (None,))]
        if path in table.zeros:
            matching.zeros.append(path)
        elif table.is_lacking(path) or dropped.issuperset(places):
            matching.absent.append(path)
        elif rule is None:
            mismatches.unnamed.append(path)
        else:
            unfilled = [place for place in places if place not in filled]
            mismatches.missing += [published_name(rule, path, layer) for _, layer in unfilled]
    mismatches.missing = list(dict.fromkeys(mismatches.missing))  # a fused weight fills several parameters
    if "lm_head.weight" in mismatches.missing:
        mismatches.hints.append(
            "If the published model has no separate head, set config.model.language.tied_embeddings to True."
        )
    if published > built > 0 and not has_known_surplus:
        mismatches.hints.append(
            f"The file has {published} layers, the model has {built}. Check the depth in config.model."
        )
    return matching


def find_slot(rule: Rule, layer: int | None, shapes: Mapping[str, tuple[int, ...]]) -> Slot | None:
    """Return the place of a published weight; None if the model has no parameter for it."""
    path = rule.path.replace("{layer}", str(layer))
    paths = tuple(path.replace("{part}", part) for part in (FUSED if "{part}" in path else [""]))
    if any(leaf not in shapes for leaf in paths):
        return None
    shape, stacked = shapes[paths[0]], layer is not None and "{layer}" not in rule.path
    if layer is not None and stacked and layer >= shape[0]:
        return None
    shape = shape[1:] if stacked else shape
    return Slot(
        rule, paths, layer if stacked else None, (len(paths), *shape) if "{part}" in rule.path else shape
    )


def num_layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of layers, stacked below `blocks` or in `blocks_0`, `blocks_1`, ..."""
    stacked = [shape[0] for path, shape in shapes.items() if path.startswith("blocks/")]
    numbered = [int(found[1]) + 1 for path in shapes if (found := re.match(r"blocks_(\d+)/", path))]
    return max(stacked + numbered, default=0)


def published_name(rule: Rule, path: str, layer: int | None) -> str:
    """Return the published name of one of our parameters, or of one layer of it.

    layer: index on the first axis of a stacked parameter; None if the number is in the path, or if the
    parameter belongs to no layer.
    """
    found = _path_pattern(rule).fullmatch(path)
    number = found["layer"] if found and layer is None and "{layer}" in rule.path else layer
    return rule.name.replace("{layer}", str(number))


def _path_pattern(rule: Rule) -> re.Pattern[str]:
    """Return the regular expression of our paths that a rule fills."""
    pattern = re.escape(rule.path)
    pattern = pattern.replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{part\}", f"(?:{'|'.join(FUSED)})")
    return re.compile(pattern)


# --- Families -----------------------------------------------------------------------------------------


def find_family(
    where: str,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    families: Mapping[str, Family] = FAMILIES,
) -> str:
    """Return the name of the family that fills most parameters from these names; the first one on a tie.

    Args:
      where: path of the file, for the error.
      names: published names in the file.
      shapes: {our path: shape} of one part of the model; only families of that part are considered.
      families: tables by name.

    Raises:
      UserError: no family of the part knows any of the names.
    """

    def num_paths(table: Family) -> int:
        return sum(any(_path_pattern(rule).fullmatch(path) for rule in table.rules) for path in shapes)

    def coverage(table: Family) -> int:
        slots = [find_slot(*found, shapes) for name in names if (found := table.match(name))]
        return len({path for slot in slots if slot for path in slot.paths})

    part = max(families.values(), key=num_paths).part
    best = max(
        (name for name, table in families.items() if table.part == part),
        key=lambda name: coverage(families[name]),
    )
    if not coverage(families[best]):
        raise UserError(
            f"{where}: none of its {len(names)} weights belongs to the {part.replace('_', ' ')}. "
            f"{describe_contents(names)}."
        )
    return best


def describe_contents(names: Sequence[str]) -> str:
    """Return the start of a sentence on what a file seems to contain, for messages."""
    titles = [table.title for table in detect_families(names)]
    shown = ", ".join(sorted(names)[:3])
    return f"It seems to contain {' and '.join(titles)}" if titles else f"Its first names are {shown}"


def detect_families(names: Sequence[str]) -> list[Family]:
    """Return the families that a file seems to contain: the best one per part, if half of it is there."""

    def share(table: Family) -> tuple[float, int]:
        wanted = {rule for rule in table.rules if rule.unless is None}
        seen = wanted & {found[0] for name in names if (found := table.match(name))}
        return len(seen) / len(wanted), len(seen)

    shares = {table: share(table) for table in FAMILIES.values()}
    best = [max((t for t in shares if t.part == part), key=lambda table: shares[table]) for part in PARTS]
    return [table for table in best if shares[table][0] >= 0.5]


def _other_part(name: str, part: str, detected: Sequence[Family]) -> str | None:
    """Return the other part of the model that a published name belongs to; None if there is none.

    detected: families of other parts that the file contains.
    """
    others = [table.part for table in FAMILIES.values() if table.part != part and table.match(name)]
    others += [table.part for table in detected if table.reason_to_ignore(name)]
    return others[0].replace("_", " ") if others else None


def collapse_numbers(names: Sequence[str]) -> list[str]:
    """Merge names that differ only in their first number: `layers.[0-3,7].mlp.up`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.match(r"(.*?\.)(\d+)(\..*)", name)
        numbers = groups.setdefault((found[1], found[3]) if found else (name, ""), [])
        numbers += [int(found[2])] if found else []
    return [f"{head}{_ranges(numbers) if numbers else ''}{tail}" for (head, tail), numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Return "[0-2,5]" for [0, 1, 2, 5], and "7" for [7]."""
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "[" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) + "]"
