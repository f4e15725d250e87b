"""Running a command: its flags, its configuration, and how it ends."""

import functools
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags
from ml_collections.config_dict import ConfigDict

from dynfocus_jax.config import CONFIG, STAGE
from dynfocus_jax.connectors.registry import change_kind, connector_fields
from dynfocus_jax.errors import RunError, UserError, suggest
from dynfocus_jax.parallel.processes import exit_process
from dynfocus_jax.records.sources import SOURCE
from dynfocus_jax.sections import Section, iterate_fields

flags.DEFINE_string(
    "config",
    None,
    "Config file, with options: FILE[:option=value,...]. Set any of its fields with --config.FIELD=VALUE.",
)
flags.DEFINE_string(
    "fields",
    None,
    "Print the configuration fields whose names begin with this prefix, such as config.data, and exit.",
)


class ConfigFlag:
    """The flag --config FILE[:option=value,...] with its overrides --config.FIELD=VALUE.

    value: the configuration once the flags are parsed, None if there is no --config.
    """

    value: ConfigDict | None = None

    def require(self, example: str) -> ConfigDict:
        """Return the configuration; raise UserError if --config is missing."""
        if self.value is None:
            raise UserError(f"--config is missing; set it to a config file such as {example}.")
        return self.value


CONFIG_FLAG = ConfigFlag()


Sections = Mapping[str, Section]  # the fields of a configuration by the full name of their section


def training_sections(config: ConfigDict | None = None) -> Sections:
    """Return the fields of the configuration of training; of the connector's those of the chosen kind."""
    kind = "dynfocus" if config is None else config.model.connector.kind
    return {
        "config": {name: field for name, field in CONFIG.items() if name != "stages"},
        "config.model.connector": connector_fields(kind),
        "config.stages[i]": STAGE,
        "config.stages[i].sources[j]": SOURCE,
    }


def run_command(
    main: Callable[[], None], sections: Callable[[ConfigDict | None], Sections] = training_sections
) -> None:
    """Run a command: parse its flags, and print an error as one sentence on stderr.

    sections: returns the fields that --fields lists, given the configuration, if there is one.

    Exit code 2 for `UserError`, 1 for `RunError` and, with its traceback, for an unexpected exception.
    """

    def guarded(_argv: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)  # libraries log a lot at lower levels
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            exit_process(2)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            exit_process(1)
        except Exception:
            traceback.print_exc()
            exit_process(1)

    for name in ("config", "fields"):  # listed by --help with the command's own flags
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    app.run(guarded, flags_parser=functools.partial(_parse_flags, sections=sections))


def _parse_flags(argv: list[str], sections: Callable[[ConfigDict | None], Sections]) -> list[str]:
    try:
        if not any(re.match(r"--?help", argument) for argument in argv):
            config, argv = _take_config(argv)
            if config is not None:
                CONFIG_FLAG.value = config
                del flags.FLAGS.config  # the flag that --help lists, which only takes a file
                config_flags.DEFINE_config_dict("config", config, "configuration", sys_argv=argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}; use flags of the form --name=value.")
        if flags.FLAGS.fields is not None:
            _print_fields(flags.FLAGS.fields, sections(CONFIG_FLAG.value))
            sys.exit(0)
        return rest
    except SystemExit:  # absl prints --help and exits with 1
        sys.exit(0)
    except UserError as error:
        sentence = str(error)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        sentence = _one_sentence(error)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _one_sentence(error: Exception) -> str:
    """Return the message of ml_collections or absl without the dump of the whole configuration."""
    text = " ".join(str(error).split()).strip("\"'")
    unknown = re.search(r'Key "(\w+)" does not exist', text)
    if unknown:
        others = re.findall(r"'(\w+)': ", text.replace("\\", ""))
        return f"the config file sets the unknown field {unknown[1]!r}{suggest(unknown[1], others)}."
    return text if text.endswith((".", "?")) else f"{text}."


# --- --config and its overrides -----------------------------------------------------------------------


def _take_config(argv: Sequence[str]) -> tuple[ConfigDict | None, list[str]]:
    """Return the configuration that --config names and the other arguments.

    The fields that they override exist in it, and connectors have the kinds that they name.
    """
    argument, rest = _split_config(argv)
    if argument is None:
        return None, rest
    config = load_config(argument)
    overrides = [flag.lstrip("-").partition("=") for flag in rest if re.match(r"--?config\.", flag)]
    _change_connectors(config, overrides)
    for path, _, _ in overrides:
        _check_override(config, path)
    return config, rest


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of the last --config and the other arguments."""
    value, rest, skip = None, [], False
    for number, argument in enumerate(argv):
        if skip:
            skip = False
        elif re.fullmatch(r"--?config", argument):
            if number + 1 == len(argv):
                raise UserError("--config has no value; set it to a config file such as configs/toy.py.")
            value, skip = argv[number + 1], True
        elif re.match(r"--?config=", argument):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return value, rest


def load_config(argument: str) -> ConfigDict:
    """Return the configuration of FILE[:option=value,...].

    Raises:
      UserError: there is no such file, or it defines no `get_config`.
    """
    path, _, options = argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config is {path!r}, which is not a file; check the path, or try configs/toy.py.")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"--config is {path!r}, which defines no get_config(); see configs/toy.py.")
    return get_config(*([options] if options else []))


class _Node(NamedTuple):
    """A value inside of a configuration and its full name."""

    value: object
    where: str


def _walk(config: ConfigDict, path: str) -> Iterator[_Node]:
    """Yield the values along a dotted path such as "config.stages[2].steps", the configuration first.

    Raises:
      UserError: there is no such field or entry.
    """
    node, where = config, "config"
    yield _Node(node, where)
    for part in path.split(".")[1:]:
        name, *indices = re.findall(r"\w+", part)
        if not isinstance(node, ConfigDict) or name not in node:
            known = node if isinstance(node, ConfigDict) else ()
            is_connector = "kind" in known and where.endswith(".connector")
            owner = f"connector {node.kind!r}" if is_connector else "the configuration"
            raise UserError(f"{where}.{name} is not a field of {owner}{suggest(name, known)}.")
        node, where = node[name], f"{where}.{name}"
        for index in map(int, indices):
            if index >= len(node):
                raise UserError(f"{where} has {len(node)} entries, so {where}[{index}] does not exist.")
            node, where = node[index], f"{where}[{index}]"
        yield _Node(node, where)


def _check_override(config: ConfigDict, path: str) -> None:
    """Check that an overridden field exists; raise UserError with the closest one if not."""
    for _ in _walk(config, path):
        pass


def _change_connectors(config: ConfigDict, overrides: Sequence[tuple[str, str, str]]) -> None:
    """Replace the section of each connector whose kind is overridden; fields of both kinds are kept.

    A stage without a connector of its own gets one that starts from the model's.
    """
    for path, _, kind in overrides:
        found = re.fullmatch(r"(config(?:\.\w+(?:\[\d+\])?)*)\.connector\.kind", path)
        if not found:
            continue
        *_, (parent, where) = _walk(config, found[1])
        if not isinstance(parent, ConfigDict) or "connector" not in parent:
            continue  # the check of the override names the wrong field
        old = parent.connector if parent.connector is not None else config.model.connector
        with parent.unlocked(), parent.ignore_type():
            parent.connector = change_kind(old, kind, f"{where}.connector")


def _print_fields(prefix: str, sections: Sections) -> None:
    """Print the declared fields whose names begin with a prefix, one per line."""
    for where, section in sections.items():
        for name, field in iterate_fields(section, where):
            if name.startswith((prefix, f"config.{prefix}")):
                print(f"{name} = {field.default_text}: {field.about} ({field.accepted})")
