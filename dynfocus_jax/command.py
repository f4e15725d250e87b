"""How a command runs: its flags, its config file, and how it ends."""

import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections.config_dict import ConfigDict

from dynfocus_jax.errors import RunError, UserError, suggest


def run_command(main: Callable[[], None]) -> None:
    """Run a command: parse the flags, turn errors into one sentence on stderr.

    Exit code 2 for `UserError`, 1 for `RunError` and, with its whole trace, for what nobody foresaw.
    """
    from dynfocus_jax.parallel.start import leave

    def guarded(_argv: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)  # the libraries' chatter would bury the run's own lines
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(2)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(1)
        except Exception:
            traceback.print_exc()
            leave(1)

    app.run(guarded, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        _check_overrides(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"argument {rest[1]!r} is not understood; arguments have the form --name=value.")
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
    """What ml_collections or absl complained of, without the dump of the whole config."""
    text = " ".join(str(error).split()).strip("\"'")
    unknown = re.search(r'Key "(\w+)" does not exist', text)
    if unknown:
        others = re.findall(r"'(\w+)': ", text.replace("\\", ""))
        return f"the config file sets the unknown field {unknown[1]!r}{suggest(unknown[1], others)}."
    return text if text.endswith((".", "?")) else f"{text}."


def _check_overrides(argv: list[str]) -> None:
    """Whether the config file exists and holds every field that the command line overrides."""
    named = [i for i, a in enumerate(argv) if re.match(r"--?config(=|$)", a)]
    if not named:
        return
    argument = argv[named[-1]].partition("=")[2] or [*argv, ""][named[-1] + 1]
    path, _, variant = argument.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config names {path!r}, which is not a file; try configs/toy.py.")
    config = runpy.run_path(path)["get_config"](*([variant] if variant else []))
    for flag in argv:
        if not re.match(r"--?config\.", flag):
            continue
        node, where = config, "config"
        for part in flag.lstrip("-").partition("=")[0].split(".")[1:]:
            name, *indices = re.findall(r"\w+", part)
            if not isinstance(node, ConfigDict) or name not in node:
                known = node if isinstance(node, ConfigDict) else ()
                raise UserError(f"{where}.{name} is not a field of the configuration{suggest(name, known)}.")
            node, where = node[name], f"{where}.{name}"
            for index in map(int, indices):
                if index >= len(node):
                    raise UserError(f"{where} has {len(node)} entries, so there is no {where}[{index}].")
                node, where = node[index], f"{where}[{index}]"
