"""A step's report as a table for the terminal, and as a sentence if the step does not fit."""

from typing import Any

GIB = 2**30


def format_report(report: dict[str, Any], is_gpu: bool = False) -> str:
    """Return a report of `report_step` as lines of text."""
    lines = [_title(report)]

    def row(name: str, value: str) -> None:
        lines.append(f"  {name:<30}{value}")

    lines.append("memory")
    for name, size in report["memory"].items():
        row(name, _gib(size))
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    row("total", f"{_gib(report['total'])} of {report['usable'] / GIB:.2f} usable: {verdict}")
    if is_gpu and report["fits"] and report["memory_fraction"] > 0.75:
        row("", "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because JAX uses 0.75 of a GPU by default")
    if report["parameters"]["optimized"]:
        row("optimizer moments for", _counts(report["parameters"]["optimized"]))
        row("no optimizer moments for", _counts(report["parameters"]["frozen"]))
    if "flops" not in report:
        return "\n".join(lines)

    lines.append("work")
    minimum = f"{report['model_flops'] / 1e12:.3f} without recomputation"
    row("matrix products", f"{report['flops'] / 1e12:9.3f} TFLOP ({minimum})")
    row("memory traffic", _gib(report["hbm_bytes"]))
    row("sent over links", _gib(report["link_bytes"]))
    for kind, entry in sorted(report["collectives"].items()):
        row(f"  {kind}", f"{_gib(entry['bytes'])} in {entry['count']} operations")
    if report["network_bytes"]:
        row("  of these to other hosts", _gib(report["network_bytes"]))
    for entry in report["largest_gathers"][:1]:
        row("largest all-gather", f"{_gib(entry['bytes'])} as {entry['shape']}")
    row("stacks gathered at once", ", ".join(report["gathered_stacks"]) or "none")

    lines.append("best-case time, at the chip's peak rates")
    for name, seconds in report["seconds"].items():
        row(name, f"{1e3 * seconds:9.1f} ms" + (" (bottleneck)" if name == report["bound"] else ""))
    speed = f"{report['tokens_per_second_bound']:,.0f} tokens/s on all devices"
    row("best-case MFU", f"{100 * report['mfu_bound']:9.1f} %, {speed}")
    return "\n".join(lines)


def describe_misfit(report: dict[str, Any]) -> str:
    """Return the sentences on a step that does not fit: its largest part, and the fields to change."""
    size = report["memory"][report["largest"]] / GIB
    return (
        f"the {report['step']} step of {report['where']} needs {report['total'] / GIB:.2f} GiB per device, "
        f"but only {report['usable'] / GIB:.2f} GiB are usable; the largest part is {report['largest']} with "
        f"{size:.2f} GiB. Change one of {report['remedy']}."
    )


def _title(report: dict[str, Any]) -> str:
    rows, each = report["rows"], report["tokens"] // report["rows"]
    tokens = f"{each} tokens (visual, text, padding)" if each > 1 else "one token"
    return f"\n{report['step']} step of {report['where']}: {rows} row{'s' * (rows > 1)} of {tokens}"


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"


def _counts(parameters: dict[str, int]) -> str:
    return ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in parameters.items()) or "none"
