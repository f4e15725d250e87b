"""Run the project's commands in a process of their own, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def command(
    name: str, *arguments, timeout: float = 600, input: str = "", **environment: str | None
) -> tuple[int, str, str]:
    """Run `python -m dynfocus_jax.<name>` in the repository; return (exit code, stdout, stderr).

    Args:
      name: the command.
      arguments: its arguments.
      timeout: seconds.
      input: text for its stdin.
      environment: variables added to those of this process; None removes one.
    """
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    done = subprocess.run(
        [sys.executable, "-m", f"dynfocus_jax.{name}", *map(str, arguments)],
        cwd=REPOSITORY,
        env={name: value for name, value in variables.items() if value is not None},
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr
