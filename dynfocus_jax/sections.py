"""Sections of a configuration, declared field by field: default, type, allowed values and meaning.

A section is a dict of `Field`s and of sections. From the declaration come the section itself
(`new_section`), its checks (`check_section`) and its documentation (`iterate_fields`). A leaf: it imports
nothing above errors.
"""

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, Union

from ml_collections.config_dict import ConfigDict, placeholder

from dynfocus_jax.errors import UserError, suggest


class Field(NamedTuple):
    """One field of a section.

    default: a value, whose type is the field's type; or a type, for a field that is None until it is set.
    about: what the field means, with its unit.
    choices: allowed values, None besides where `default` is a type; of a tuple: those of each of its entries.
    above, at_least, below, at_most: limits of a number.
    """

    default: Any
    about: str
    choices: Collection[str] | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    @property
    def type(self) -> type:
        """Return the type of its values."""
        return self.default if isinstance(self.default, type) else type(self.default)

    @property
    def default_text(self) -> str:
        """Return the value of a new section as text."""
        if isinstance(self.default, type):
            return "None"
        return repr(self.default.to_dict() if isinstance(self.default, ConfigDict) else self.default)

    @property
    def accepted(self) -> str:
        """Return the accepted values in words, such as "an integer at least 1"."""
        if self.choices is not None:
            kind = "any of" if self.type is tuple else "one of"
            return f"{kind} {', '.join(map(repr, self.choices))}"
        limits = [
            "finite" if limit == math.inf else f"{words} {limit}"
            for words, limit in (
                ("greater than", self.above),
                ("at least", self.at_least),
                ("less than", self.below),
                ("at most", self.at_most),
            )
            if limit is not None
        ]
        names = {
            int: "an integer",
            float: "a number",
            str: "a string",
            bool: "True or False",
            ConfigDict: "a section",
        }
        kind = names.get(self.type, f"a {self.type.__name__}")
        return " ".join([kind, " and ".join(limits)]).strip()


Section = Mapping[str, Union[Field, "Section"]]


def require(condition: bool, sentence: str) -> None:
    """Check a condition; raise UserError with the sentence if it does not hold."""
    if not condition:
        raise UserError(sentence)


def new_section(fields: Section) -> ConfigDict:
    """Return the section with its defaults; an unset field is a typed placeholder."""

    def value(field: Field | Section):
        if not isinstance(field, Field):
            return new_section(field)
        return placeholder(field.default) if isinstance(field.default, type) else copy.copy(field.default)

    return ConfigDict({name: value(field) for name, field in fields.items()})


def fill_section(fields: Section, values: Mapping[str, Any], where: str) -> ConfigDict:
    """Return the section with some of its fields set, locked.

    Raises:
      UserError: a value for a field that does not exist; the message calls the section `where`.
    """
    section = new_section(fields).lock()
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{where} has no field {name!r}{suggest(name, fields)}.")
        if isinstance(section[name], ConfigDict):
            section[name].update(value)
        else:
            section[name] = value
    return section


def check_section(section: ConfigDict, fields: Section, where: str) -> None:
    """Check names, types, allowed values and limits of all fields; raise UserError if one is wrong.

    where: what the section is called in messages, such as "config.model". A field that is None passes, if
    None is its default.
    """
    for name in section:
        if name not in fields:
            raise UserError(f"{where}.{name} is not a field of the configuration{suggest(name, fields)}.")
    for name, field in fields.items():
        place = f"{where}.{name}"
        if name not in section:
            raise UserError(f"{place} is missing; start from dynfocus_jax.config.default_config().")
        value = section[name]
        if isinstance(field, Field):
            check_value(value, field, place)
        elif not isinstance(value, ConfigDict):
            raise UserError(f"{place} is {value!r}, expected a section with the fields {', '.join(field)}.")
        else:
            check_section(value, field, place)


def check_value(value: Any, field: Field, where: str) -> None:
    """Check a single value; raise UserError if it is of another type, no choice or out of limits."""
    if value is None:
        require(isinstance(field.default, type), f"{where} is not set, expected {field.accepted}.")
        return
    if not _has_type(value, field.type):
        raise UserError(f"{where} is {value!r} of type {type(value).__name__}, expected {field.accepted}.")
    if field.choices is not None:
        entries = value if isinstance(value, tuple | list) else (value,)
        for entry in entries:
            place = where if entries is not value else f"an entry of {where}"
            listed = ", ".join(map(repr, field.choices))
            require(entry in field.choices, f"{place} is {entry!r}, expected one of {listed}.")
    elif isinstance(value, int | float):
        good = (
            (field.above is None or value > field.above)
            and (field.at_least is None or value >= field.at_least)
            and (field.below is None or value < field.below)
            and (field.at_most is None or value <= field.at_most)
        )
        require(good, f"{where} is {value}, expected {field.accepted}.")


def _has_type(value: Any, expected: type) -> bool:
    if isinstance(value, bool):
        return expected is bool
    if expected is float:
        return isinstance(value, int | float)
    if expected is tuple:
        return isinstance(value, tuple | list)
    return isinstance(value, expected)


def iterate_fields(fields: Section, where: str) -> Iterator[tuple[str, Field]]:
    """Yield every field of a section and of the sections in it, with its full name, such as "config.seed"."""
    for name, field in fields.items():
        if isinstance(field, Field):
            yield f"{where}.{name}", field
        else:
            yield from iterate_fields(field, f"{where}.{name}")


def to_dict(section: ConfigDict) -> dict:
    """Return the section as plain dicts and lists, for JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, ConfigDict):
            return {key: plain(value[key]) for key in value}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(section)


def differences(old, new, labels: tuple[str, str] = ("then", "now"), where: str = "") -> list[str]:
    """List where two plain configurations (`to_dict`) differ: "FIELD: then OLD, now NEW", in field order."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in old | new
            for line in differences(old.get(key), new.get(key), labels, f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {labels[0]} {old!r}, {labels[1]} {new!r}"]
