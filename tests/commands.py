"""Running the project's commands as a user does, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def command(
    name: str, *arguments, timeout: float = 600, input: str = "", **environment: str | None
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m dynfocus_jax.<name>`, started in the repository.

    environment: variables that it has besides this process's; None takes one away.
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
