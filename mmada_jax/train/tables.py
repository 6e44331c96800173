"""What came of a sweep: results.csv, results.md and results.png."""

import csv
import importlib.util
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmada_jax import storage
from mmada_jax.storage import write_whole
from mmada_jax.train.sweep import ENDED, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A plot names trials by color and letters; of more trials only the best are named.
_NAMED = 12


def write(workdir: storage.Path, trials: Sequence[Trial], metric: str) -> None:
    """Writes results.csv and results.md: what is done first, by the metric."""
    rows = []
    for trial in trials:
        record = trial.record
        facts = {"status": record["status"], "minutes": round(record["seconds"] / 60, 2)}
        rows.append({"trial": trial.folder.name, **trial.overrides, **facts, **trial.values})
    rows.sort(key=lambda row: _order(row["status"], row, metric))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(workdir / "results.csv", text.getvalue())
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    write_whole(workdir / "results.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))


def _order(status: str, values: dict[str, Any], metric: str) -> tuple:
    """What sorts trials: status, then the metric, lowest first or highest first."""
    value = values.get(metric.removeprefix("-"), math.nan)
    rank = (*ENDED, status).index(status)
    return rank, math.isnan(value), -value if metric.startswith("-") else value


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


# ---- The plot ------------------------------------------------------------------------------------


def plot(workdir: storage.Path, trials: Sequence[Trial], metric: str) -> str:
    """Writes results.png: the varied keys of each trial beside its metric, and the metric over the steps.

    Returns a line that says why there is no plot, or an empty text. Trials without a finite value of the
    metric aren't drawn."""
    name = metric.removeprefix("-")
    if importlib.util.find_spec("matplotlib") is None:
        return "results.png needs matplotlib: pip install 'mmada_jax[digits]'"
    drawn = []
    for trial in trials:
        rows = [row for row in trial.rows if math.isfinite(row.get(name, math.nan))]
        if rows:
            drawn.append((trial, trial.record["status"], rows))
    if not drawn:
        return f"there is no results.png: no trial has a finite {name!r} yet"
    drawn.sort(key=lambda one: _order(one[1], one[2][-1], metric))

    import matplotlib
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for trial, *_ in drawn for key in trial.overrides))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        width = max(8.0, 1.7 * (len(keys) + 2))
        figure = Figure(figsize=(width, 8.5), layout="constrained")
        upper, lower = figure.subplots(2, 1)
        # The best trial is the darkest and lies above the others.
        colors = matplotlib.colormaps["viridis"](
            [0.9 * i / max(1, len(drawn) - 1) for i in range(len(drawn))]
        )
        styles = [
            {"color": color, "zorder": 100 - i, "linewidth": 2.2 if i == 0 else 1.3,
             "linestyle": "-" if status == "done" else "--"}
            for i, (color, (_, status, _)) in enumerate(zip(colors, drawn, strict=True))
        ]  # fmt: skip
        _parallel(upper, keys, name, drawn, styles)
        _curves(lower, name, drawn, styles)
        what = f"{storage.resolved(workdir).name}: {len(drawn)} trials by {metric}"
        upper.set_title(f"{what} (darkest: best; dashed: not done, or stopped early)", pad=18)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    write_whole(workdir / "results.png", file.getvalue())
    return ""


def _parallel(axis: "Axes", keys: list[str], name: str, drawn: list, styles: list[dict]) -> None:
    """A vertical scale for each key and one for the metric, and a line through them for each trial."""
    columns = [[trial.overrides.get(key) for trial, *_ in drawn] for key in keys]
    columns.append([rows[-1][name] for *_, rows in drawn])
    heights = []
    for x, column in enumerate(columns):
        places, ticks = scale(column)
        heights.append(places)
        axis.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        side = 1 if x == len(keys) else -1  # of the scale, where its labels are; the metric has its right
        for y, label in ticks:
            axis.plot([x, x + 0.015 * side], [y, y], color="0.4", linewidth=0.8)
            axis.annotate(
                label, (x, y), (5 * side, 0), textcoords="offset points", va="center", zorder=200,
                ha="left" if side > 0 else "right",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
            )  # fmt: skip
    for i, style in enumerate(styles):
        axis.plot(
            range(len(columns)), [places[i] for places in heights], marker="o", markersize=3.5, **style
        )
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.06, 1.06), yticks=[])
    axis.set_xticks(range(len(columns)), [*keys, f"{name} (last)"])
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(axis="x", length=0, pad=6)


def scale(column: list) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights of values from 0 to 1, and the heights with their labels that a scale shows.

    Numbers that span a factor of ten or more are spread by their logarithm; what isn't all numbers, or is a
    few of them, has a place for each value."""
    different = list(dict.fromkeys(column))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in different)
    different = sorted(different) if numbers else different
    if not numbers or len(different) == 1:
        places = {
            repr(v): (i / (len(different) - 1) if len(different) > 1 else 0.5)
            for i, v in enumerate(different)
        }
        return [places[repr(v)] for v in column], [(places[repr(v)], _cell(v)[:18]) for v in different]
    low, high = different[0], different[-1]
    log = low > 0 and high / low >= 10
    to = math.log if log else float

    def height(value):
        return (to(value) - to(low)) / (to(high) - to(low))

    shown: list[float] = []
    if len(different) > 6:
        spread = [(1 - t) * to(low) + t * to(high) for t in (0, 0.25, 0.5, 0.75, 1)]
        whole = all(isinstance(value, int) for value in different)
        different = [math.exp(value) if log else value for value in spread]
        different = [round(value) for value in different] if whole else different
    for value in different:
        if not shown or height(value) - height(shown[-1]) > 0.05:  # labels don't cover each other
            shown.append(value)
    return [height(v) for v in column], [(height(v), f"{v:.3g}") for v in shown]


def _curves(axis: "Axes", name: str, drawn: list, styles: list[dict]) -> None:
    """The metric over the steps of each trial."""
    values = []
    for i, ((trial, status, rows), style) in enumerate(zip(drawn, styles, strict=True)):
        steps, curve = [row["step"] for row in rows], [row[name] for row in rows]
        number = "-".join(trial.folder.name.split("-")[:2])
        label = f"{number}: {curve[-1]:.3g}" + ("" if status == "done" else f", {status}")
        axis.plot(steps, curve, label=label if i < _NAMED else None, **style)
        axis.plot(
            steps[-1], curve[-1], marker="o", markersize=3.5, color=style["color"], zorder=style["zorder"]
        )
        values += curve
    if min(values) > 0 and max(values) / min(values) >= 10:
        axis.set_yscale("log")
    axis.set(xlabel="step", ylabel=name)
    axis.grid(alpha=0.25)
    more = f"the best {_NAMED} of {len(drawn)}" if len(drawn) > _NAMED else None
    axis.legend(
        fontsize=7, frameon=False, title=more, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1)
    )
