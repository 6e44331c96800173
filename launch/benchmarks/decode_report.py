"""What `mmada bench decode` shows of its report: the tables and the figure."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from launch.benchmarks import timing


class Column(NamedTuple):
    """A column of the table: its head, its width, and its text in a row."""

    head: str
    width: int
    text: Callable[[Mapping[str, Any]], str]


COLUMNS = (
    Column("steps", 7, lambda row: f"{row['steps']}"),
    Column("seconds: median (quartiles)", 30, lambda row: timing.as_text(row["seconds"], 3)),
    Column("calls", 7, lambda row: f"{row['turns']}"),
    Column("tokens/s", 11, lambda row: f"{row['tokens_per_second']:.1f}"),
    Column("RATIO", 9, lambda row: "-" if row["ratio"] is None else f"{row['ratio']:.2f}"),
    Column("equal", 10, lambda row: "-" if row["equal"] is None else f"{100 * row['equal']:.1f} %"),
    Column("compiling, s", 14, lambda row: f"{row['compile_seconds']:.1f}"),
)


def as_text(report: Mapping[str, Any]) -> str:
    """The tables, and what it takes to read them."""
    model = report["model"]
    lines = [
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        f"{model['name']}: {model['params']:,} parameters, {model['dtype']}; prompts: {model['prompts']}; "
        f"load {report['load'][0]} before, {report['load'][1]} after",
    ]
    if report["stopped"]:
        lines.append("stopped by Ctrl-C: this is what was measured until then")
    last = None
    for row in report["rows"]:
        if last != (last := (row["batch"], row["new"])):
            title = f"batch {row['batch']}, {row['new']} new tokens"
            lines += ["", f"{title:<28}" + "".join(f"{column.head:>{column.width}}" for column in COLUMNS)]
        if row["seconds"] is None:
            lines.append(
                f"{row['technique']:<28}{row['steps']:>7}  not timed: a call would take about "
                f"{row['expected_seconds']:.0f} s (--most)"
            )
            continue
        cells = (f"{column.text(row):>{column.width}}" for column in COLUMNS)
        lines.append(f"{row['technique']:<28}" + "".join(cells))
    if report["engine"]:
        lines += ["", *(engine_as_text(name, engine) for name, engine in report["engine"].items())]
    if report["first_token"]:
        first = report["first_token"]
        lines.append(
            f"first token of a request by `all`: {1000 * first['seconds']:.1f} ms after it, "
            f"{first['steps']:.2f} steps of plain decoding"
        )
    if report["drawing"]:
        lines += ["", drawing_as_text(report["drawing"])]
    if report["cases"]:
        lines += ["", *cases_as_text(report["cases"])]
    lines += [
        "",
        "RATIO is plain / technique by medians; `calls` says of how many calls a median is.",
        "Tokens are counted up to the end of each answer; equal: as plain decoding says them.",
    ]
    if model["name"] == "random weights":
        lines.append(
            "Random weights are never certain: `all` reveals four tokens in each step and doesn't stop."
        )
    return "\n".join(lines)


def engine_as_text(name: str, engine: Mapping[str, Any]) -> str:
    """The engine against one request after the other, by a technique."""
    one, together = (timing.as_text(engine["seconds"][name], 2) for name in ("one by one", "together"))
    return (
        f"{engine['rows']} requests by `{name}`, one by one {one} s, in that many slots {together} s: "
        f"RATIO {engine['ratio']:.2f}, {'equal' if engine['equal'] else 'UNEQUAL'} tokens, "
        f"{100 * engine['idle']:.1f} % of the slots idle while requests waited"
    )


def drawing_as_text(drawn: Mapping[str, Any]) -> str:
    """Guided drawing against guidance now and then."""
    plain, fast = (timing.as_text(drawn["seconds"][name], 3) for name in ("plain", "fast"))
    return (
        f"{drawn['rows']} guided drawings of {drawn['tokens']} tokens, {drawn['steps']} steps: {plain} s, "
        f"with guidance in every {drawn['guide_every']}. step {fast} s: RATIO {drawn['ratio']:.2f}"
    )


def cases_as_text(judged: Mapping[str, Any]) -> list[str]:
    """The table of accuracy."""
    total, title = judged["total"], f"{judged['total']} held-out cases, {judged['new']} new"
    lines = [f"{title:<28}{'right':>18}{'only plain':>12}{'only it':>9}{'p':>8}{'equal':>10}"]
    for name, of in judged["techniques"].items():
        share = f"{of['correct']} ({100 * of['correct'] / total:.1f} %)"
        lines.append(
            f"{name:<28}{share:>18}{of['only_plain']:>12}{of['only_it']:>9}{of['p']:>8.2g}"
            f"{100 * of['equal']:>8.1f} %"
        )
    return lines


def figure(report: Mapping[str, Any]) -> Any:
    """A figure: plain / technique over the number of new tokens. Each technique is a line, each batch a
    panel."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["ratio"] is not None and row["technique"] != "plain"]
    batches = sorted({row["batch"] for row in rows}) or [report["rows"][0]["batch"]]
    names = list(dict.fromkeys(row["technique"] for row in rows))
    drawn = Figure(figsize=(6 * len(batches), 4.2), layout="constrained")
    for axis, batch in zip(drawn.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for i, name in enumerate(names):
            points = sorted(
                (r["new"], r["ratio"]) for r in rows if (r["batch"], r["technique"]) == (batch, name)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=name)
        axis.axhline(1, color="0.6", lw=1, ls="--")
        axis.set(xscale="log", yscale="log", xlabel="new tokens", ylabel="times as fast as plain decoding")
        axis.set_title(f"batch {batch}, {report['model']['name']}", fontsize=10)
        news = sorted({row["new"] for row in report["rows"]})
        axis.set_xticks(news, [str(new) for new in news])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        ticks = [t for t in (0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200) if low <= t <= high]
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        if names:
            axis.legend(fontsize=8)
    return drawn
