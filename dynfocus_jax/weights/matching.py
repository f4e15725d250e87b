"""Matching of published names: the parameter that each fills, or the reason why it is left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dynfocus_jax.errors import UserError
from dynfocus_jax.published_names import FUSED, PARTS, Family, Rule
from dynfocus_jax.weights.layout import published_shape
from dynfocus_jax.weights.tables import FAMILIES, TIED


@dataclass(frozen=True)
class Slot:
    """Place of a published weight in our parameters.

    rule: of the table; paths: our leaves, several for a fused weight; layer: on their first axis (None when
    they are not stacked); shape: of what goes there, with a first axis over `paths` for a fused weight.
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
class Problems:
    """Mismatches: published names, our paths that the family lacks, and sentences about the rest."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.foreign or self.shapes or self.others)

    def lines(self) -> list[str]:
        """A line a group, with every name in it."""
        groups = {
            "missing": collapse(self.missing),
            "unexpected": collapse(self.unexpected),
            "of the model are unknown there": self.foreign,
            "mis-shaped": collapse(self.shapes),
        }
        counts = [len(names) for names in (self.missing, self.unexpected, self.foreign, self.shapes)]
        named = [
            f"{count} {what}: {('; ' if what == 'mis-shaped' else ', ').join(names)}"
            for count, (what, names) in zip(counts, groups.items(), strict=True)
            if count
        ]
        return [*named, *self.others, *self.hints]


@dataclass
class Plan:
    """Matched names of a source.

    slots: published name -> place; tied: name of a head that the embedding stands for; absent: our leaves
    that are left out; zeros: our leaves that are zero; left_out: why -> names; skipped: patterns of `skip`
    that matched.
    """

    slots: dict[str, Slot] = field(default_factory=dict)
    tied: str | None = None
    absent: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=Problems)

    def leave_out(self, name: str, why: str) -> None:
        self.left_out.setdefault(why, []).append(name)


def make_plan(
    table: Family,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    skip: Sequence[str] = (),
    depth: int | None = None,
) -> Plan:
    """The plan of reading `names` into the leaves `shapes` ({our path: shape}) by a table.

    depth: layers of the published network, where ours leaves out its last ones.
    """
    plan = Plan()
    built = num_layers(shapes)
    matches = {name: table.match(name) for name in names}
    published = 1 + max(
        (found[1] for found in matches.values() if found and found[1] is not None), default=-1
    )
    behind = published > built and published in {
        count + spare for count in (built, depth or built) for spare in (0, table.spare_layers)
    }

    held = [other for other in held_families(names) if other.part != table.part]
    filled: dict[tuple[str, int | None], str] = {}  # (our path, layer) -> published name
    dropped: set[tuple[str, int | None]] = set()
    for name, found in matches.items():
        slot = found and make_slot(*found, shapes)
        patterns = {pattern for pattern in skip if re.fullmatch(pattern, name)}
        if patterns:
            plan.skipped |= patterns
            plan.leave_out(name, "skipped as asked for")
            dropped |= {(path, slot.layer) for path in slot.paths} if slot else set()
        elif slot:
            twins = {filled[path, slot.layer] for path in slot.paths if (path, slot.layer) in filled}
            if twins:
                plan.problems.others.append(f"{name} and {', '.join(twins)} fill the same parameter.")
            filled |= {(path, slot.layer): name for path in slot.paths}
            plan.slots[name] = slot
        elif found and found[1] is not None and found[1] >= built and behind:
            plan.leave_out(name, f"the file has {published} layers, of which the first {built} are built")
        elif found and found[0].unless == TIED:
            plan.tied = name
            plan.leave_out(name, TIED)
        elif found and found[0].unless:
            plan.leave_out(name, found[0].unless)
        elif reason := table.reason_to_ignore(name):
            plan.leave_out(name, reason)
        elif not found and (other := _part_of(name, table.part, held)):
            plan.leave_out(name, f"belongs to the {other}")
        else:
            plan.problems.unexpected.append(name)

    for path, shape in shapes.items():
        rule = next((rule for rule in table.rules if _leaf(rule).fullmatch(path)), None)
        stacked = rule is not None and "{layer}" in rule.name and "{layer}" not in rule.path
        places = [(path, layer) for layer in (range(shape[0]) if stacked else (None,))]
        if path in table.zeros:
            plan.zeros.append(path)
        elif table.is_lacking(path) or dropped.issuperset(places):
            plan.absent.append(path)
        elif rule is None:
            plan.problems.foreign.append(path)
        else:
            lost = [place for place in places if place not in filled]
            plan.problems.missing += [published_name(rule, path, layer) for _, layer in lost]
    plan.problems.missing = list(dict.fromkeys(plan.problems.missing))  # a fused weight fills several leaves
    if "lm_head.weight" in plan.problems.missing:
        plan.problems.hints.append("Without an own head, set config.model.language.tied_embeddings to True.")
    if published > built > 0 and not behind:
        plan.problems.hints.append(f"The file has {published} layers, the model {built}: is its depth right?")
    return plan


def make_slot(rule: Rule, layer: int | None, shapes: Mapping[str, tuple[int, ...]]) -> Slot | None:
    """The place of a published weight; None when the model has none for it."""
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
    """Layers that the leaves hold, stacked below `blocks` or in `blocks_0`, `blocks_1`, ..."""
    stacked = [shape[0] for path, shape in shapes.items() if path.startswith("blocks/")]
    numbered = [int(found[1]) + 1 for path in shapes if (found := re.match(r"blocks_(\d+)/", path))]
    return max(stacked + numbered, default=0)


def published_name(rule: Rule, path: str, layer: int | None) -> str:
    """The name of one of our leaves (of a layer of it) by a rule."""
    found = _leaf(rule).fullmatch(path)
    if layer is None and "{layer}" in rule.path:
        layer = int(found["layer"])
    return rule.name.replace("{layer}", str(layer))


def _leaf(rule: Rule) -> re.Pattern:
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
    """The family of the leaves' part that fills most of them by these names; of several, the first.

    Raises:
      UserError: no family of the part knows any of the names.
    """

    def leaves_of(table: Family) -> int:
        return sum(any(_leaf(rule).fullmatch(path) for rule in table.rules) for path in shapes)

    def coverage(table: Family) -> int:
        slots = [make_slot(*found, shapes) for name in names if (found := table.match(name))]
        return len({path for slot in slots if slot for path in slot.paths})

    part = max(families.values(), key=leaves_of).part
    best = max(
        (name for name, table in families.items() if table.part == part),
        key=lambda name: coverage(families[name]),
    )
    if not coverage(families[best]):
        raise UserError(
            f"{where}: none of its {len(names)} weights belongs to the {part.replace('_', ' ')}; "
            f"{looks_like(names)}."
        )
    return best


def looks_like(names: Sequence[str]) -> str:
    """Describe what a file seems to contain, for messages."""
    held = [table.title for table in held_families(names)]
    shown = ", ".join(sorted(names)[:3])
    return f"it seems to hold {' and '.join(held)}" if held else f"its names are of the kind {shown}"


def held_families(names: Sequence[str]) -> list[Family]:
    """Return the families a file seems to contain: per part the best one, if half of it is there."""

    def share(table: Family) -> tuple[float, int]:
        wanted = {rule for rule in table.rules if rule.unless is None}
        seen = wanted & {found[0] for name in names if (found := table.match(name))}
        return len(seen) / len(wanted), len(seen)

    shares = {table: share(table) for table in FAMILIES.values()}
    best = [max((t for t in shares if t.part == part), key=lambda table: shares[table]) for part in PARTS]
    return [table for table in best if shares[table][0] >= 0.5]


def _part_of(name: str, part: str, held: Sequence[Family]) -> str | None:
    """Return the other part of the model that a published name belongs to; None if there is none."""
    others = [table.part for table in FAMILIES.values() if table.part != part and table.match(name)]
    others += [table.part for table in held if table.reason_to_ignore(name)]
    return others[0].replace("_", " ") if others else None


def collapse(names: Sequence[str]) -> list[str]:
    """Names that differ in their first number only as one: `layers.[0-3,7].mlp.up`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.match(r"(.*?\.)(\d+)(\..*)", name)
        numbers = groups.setdefault((found[1], found[3]) if found else (name, ""), [])
        numbers += [int(found[2])] if found else []
    return [f"{head}{_ranges(numbers) if numbers else ''}{tail}" for (head, tail), numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] to "[0-2,5]", a single number to itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "[" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) + "]"
