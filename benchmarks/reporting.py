"""Functions that the benchmark scripts share: the machine's name, time, memory, tables and output files."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def processor() -> str:
    """Return the name of the CPU and its number of usable cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {len(os.sched_getaffinity(0))} cores"


def peak_memory(run: Callable[[], object]) -> float:
    """Call `run` and return the peak resident memory of this process during the call, MiB (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    run()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call, seconds."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def command_environment() -> dict[str, str]:
    """Return the environment variables for a command of this repository that is started in any folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option --output, a path for `write_report`."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="Markdown file for the results; a JSON file is written beside it (default: print only)",
    )


def write_report(output: Path | None, text: str, record: Any) -> None:
    """Write the results as Markdown to `output` and as JSON beside it; write nothing if it is None."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output} and {output.with_suffix('.json')}")
