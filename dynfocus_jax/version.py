"""Version of the code, recorded with checkpoints and results."""

import hashlib
import subprocess
from pathlib import Path

import jax

_PACKAGE = Path(__file__).parent


def code_version() -> dict[str, str | None]:
    """Return a digest of the "source", the "commit" (None outside of a checkout) and the version of "jax"."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return {"source": digest.hexdigest()[:12], "commit": _commit(), "jax": jax.__version__}


def _commit() -> str | None:
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
