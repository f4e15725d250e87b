"""Connectors by name: the class of a kind, its section of the configuration, and the module of a model."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from dynfocus_jax import connectors
from dynfocus_jax.connectors.interface import Connector, Dimensions
from dynfocus_jax.errors import UserError, suggest
from dynfocus_jax.sections import Field, Section, check_section, fill_section, new_section

_NOT_KINDS = ("interface", "registry")  # modules of connectors/ that are no connectors

KIND = Field(
    "dynfocus",
    "method that turns frame features into language tokens: the name of a file in "
    "dynfocus_jax/connectors, or "
    '"my_module:MyConnector" for one outside the package',
)


def connector_kinds() -> list[str]:
    """Return the names of the connectors in the package."""
    names = (module.name for module in pkgutil.iter_modules(connectors.__path__))
    return sorted(name for name in names if name not in _NOT_KINDS)


def find_connector(kind: str, where: str = "config.model.connector.kind") -> type[Connector]:
    """Return the class of a connector.

    Args:
      kind: a name of `connector_kinds()`, or "module:Class" for one outside of the package.
      where: the field that names it, for messages.

    Raises:
      UserError: there is no such connector, its module cannot be imported, or it is no `Connector`.
    """
    module_name, _, class_name = kind.partition(":")
    if not class_name:
        if kind not in connector_kinds():
            raise UserError(
                f"{where} is {kind!r}, which is not a connector{suggest(kind, connector_kinds())}; for one "
                "outside the package, use 'my_module:MyConnector'."
            )
        return importlib.import_module(f"{connectors.__name__}.{kind}").CONNECTOR
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where} is {kind!r}, but the module {module_name!r} cannot be imported "
            f"({type(error).__name__}: {reason}); check its name and that its folder is on PYTHONPATH."
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"{where} is {kind!r}, but the module {module_name!r} has no {class_name!r}.")
    if not (isinstance(found, type) and issubclass(found, Connector)):
        raise UserError(
            f"{where} is {kind!r}, but {class_name!r} is not a subclass of "
            "dynfocus_jax.connectors.interface.Connector."
        )
    for method in ("length", "__call__"):
        if getattr(found, method) is getattr(Connector, method):
            raise UserError(f"{where} is {kind!r}, but {class_name!r} does not define {method!r}.")
    return found


def connector_fields(kind: str, where: str = "config.model.connector.kind") -> Section:
    """Return the fields of a connector's section: `kind` and the method's own."""
    return {"kind": KIND._replace(default=kind), **find_connector(kind, where).FIELDS}


def connector(kind: str, /, **fields: Any) -> ConfigDict:
    """Return the section of a connector with some of its fields set.

        config.model.connector = connector("dynfocus", pool=(4, 4), dpe={"ratio": 0.5})

    Raises:
      UserError: there is no such connector, or it has no such field.
    """
    return fill_section(connector_fields(kind), fields, f"connector {kind!r}")


def change_kind(section: ConfigDict, kind: str, where: str) -> ConfigDict:
    """Return the section of another connector, with the values of the fields that both have."""
    fields = connector_fields(kind, f"{where}.kind")
    changed = new_section(fields)
    _take_shared(changed, section)
    changed.kind = kind
    return changed.lock()


def _take_shared(changed: ConfigDict, section: Mapping[str, Any]) -> None:
    for name, value in section.items():
        if name not in changed:
            continue
        if isinstance(value, ConfigDict) and isinstance(changed[name], ConfigDict):
            _take_shared(changed[name], value)
        elif value is None or isinstance(value, changed.get_type(name)):
            changed[name] = value


def check_connector(section: ConfigDict, model: ConfigDict, where: str) -> None:
    """Check a connector's section: its kind, its fields and what the connector checks itself.

    Args:
      section: such as `config.model.connector`; model: the section `config.model`; where: its name.

    Raises:
      UserError: one sentence that names the field.
    """
    if not isinstance(section, ConfigDict) or not isinstance(section.get("kind"), str):
        raise UserError(f"{where} is {section!r}, expected a section: connector(kind, field=value, ...).")
    kind = section.kind
    fields = connector_fields(kind, f"{where}.kind")
    for name in section:
        if name not in fields:
            raise UserError(f"{where}.{name} is not a field of connector {kind!r}{suggest(name, fields)}.")
    check_section(section, fields, where)
    find_connector(kind).check(section, model, where)


def make_connector(model: ConfigDict) -> Connector:
    """Return the connector of a model section (`config.model`): a linen module, without parameters."""
    vision = model.vision
    return find_connector(model.connector.kind)(
        settings=FrozenConfigDict(model.connector),
        dimensions=Dimensions(
            grid=(vision.image_size // vision.patch_size,) * 2,
            vision_width=vision.width,
            language_width=model.language.width,
        ),
        dtype=model.dtype,
        param_dtype=model.param_dtype,
    )
