"""A plan's report as a table to be read, and as the sentence on what does not fit."""

GIB = 2**30


def format_step(report: dict, is_gpu: bool = False) -> str:
    """The report on a step, from `plan_step`, as lines of text."""
    lines = [_title(report)]

    def row(name: str, value: str) -> None:
        lines.append(f"  {name:<30}{value}")

    lines.append("memory")
    for name, size in report["memory"].items():
        row(name, _gib(size))
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    row("total", f"{_gib(report['total'])} of {report['usable'] / GIB:.2f} usable: {verdict}")
    if is_gpu and report["fits"] and report["memory_fraction"] > 0.75:
        row("", "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes 0.75 of a GPU unless told")
    if report["parameters"]["optimized"]:
        row("optimizer has moments of", _counts(report["parameters"]["optimized"]))
        row("and none of the frozen", _counts(report["parameters"]["frozen"]))
    if "flops" not in report:
        return "\n".join(lines)

    lines.append("work")
    once = f"{report['model_flops'] / 1e12:.3f} when nothing is computed twice"
    row("matrix products", f"{report['flops'] / 1e12:9.3f} TFLOP ({once})")
    row("memory traffic", _gib(report["hbm_bytes"]))
    row("sent over the links", _gib(report["link_bytes"]))
    for kind, entry in sorted(report["collectives"].items()):
        row(f"  {kind}", f"{_gib(entry['bytes'])} in {entry['count']}")
    if report["network_bytes"]:
        row("  of it to other hosts", _gib(report["network_bytes"]))
    for entry in report["largest_gathers"][:1]:
        row("largest all-gather", f"{_gib(entry['bytes'])} as {entry['shape']}")
    row("stacks of layers gathered", ", ".join(report["gathered_stacks"]) or "none")

    lines.append("time, were nothing slower than the chip's peaks")
    for name, seconds in report["seconds"].items():
        row(name, f"{1e3 * seconds:9.1f} ms" + (", the bound" if name == report["bound"] else ""))
    speed = f"{report['tokens_per_second_bound']:,.0f} tokens/s on all devices"
    row("so at best", f"{100 * report['mfu_bound']:9.1f} % MFU, {speed}")
    return "\n".join(lines)


def misfit(report: dict) -> str:
    """The sentence on a step that does not fit: its largest part and what to change."""
    size = report["memory"][report["largest"]] / GIB
    return (
        f"the {report['step']} step of {report['where']} needs {report['total'] / GIB:.2f} GiB a device, "
        f"but {report['usable'] / GIB:.2f} are usable; the largest part is {report['largest']}, "
        f"{size:.2f} GiB. Change {report['remedy']}."
    )


def _title(report: dict) -> str:
    rows, each = report["rows"], report["tokens"] // report["rows"]
    tokens = f"{each} tokens (visual, text, padding)" if each > 1 else "one token"
    return f"\n{report['step']} step of {report['where']}: {rows} row{'s' * (rows > 1)} of {tokens}"


def _gib(size: float) -> str:
    return f"{size / GIB:9.3f} GiB"


def _counts(parameters: dict[str, int]) -> str:
    return ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in parameters.items()) or "none"
