"""How far the results of the quickstart differ from run to run: it is run with several seeds.

    mmada bench seeds --workdir runs/seeds --seeds 0 1 2 3 4

Writes WORKDIR/seeds.md. A row has the mean of a metric, its least share, its deviation among the seeds, and
the least share less three standard errors, which is its floor in launch/quickstart_stages.py. The runs are
in WORKDIR/seed-N. What is done already isn't done again, so that several of these, each with seeds of its
own, can share a workdir; ask for all of them in the end.
"""

import argparse
import json
import math
import pathlib

import numpy as np

from launch import quickstart_stages
from mmada_jax.storage import write_whole


def measure(args: argparse.Namespace) -> dict[int, dict]:
    """Runs what isn't done yet, and writes the table. Reports of the quickstart by seed."""
    workdir, form = pathlib.Path(args.workdir), quickstart_stages.FORMS[args.form]
    results = {}
    for seed in args.seeds:
        folder = workdir / f"seed-{seed}"
        quickstart_stages.claim(folder, {"form": args.form, "seed": seed})
        results[seed] = quickstart_stages.run(folder, form, seed)
    write_whole(workdir / "seeds.json", json.dumps(results, indent=1))
    write_whole(workdir / "seeds.md", as_text(results) + "\n")
    return results


def as_text(results: dict[int, dict]) -> str:
    """The table."""
    return "\n".join(table(list(results.values())))


def table(results: list[dict]) -> list[str]:
    """Markdown: a row for each metric of each stage, of runs that measured the same ones."""
    lines = [
        "| stage | metric | cases | mean | least | deviation | floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, of_stage in results[0]["stages"].items():
        for name, count in of_stage.items():
            if name == "rewards":
                for task in count:
                    rewards = [result["stages"][stage][name][task] for result in results]
                    row = (np.mean(rewards), min(rewards), np.std(rewards, ddof=1))
                    cells = [f"{value:.3f}" for value in row]
                    lines.append(f"| {stage} | reward of {task} | | {' | '.join(cells)} | |")
            elif isinstance(count, dict):
                of_seeds = [result["stages"][stage][name] for result in results]
                shares = [one["correct"] / one["total"] for one in of_seeds]
                row = (
                    np.mean(shares),
                    min(shares),
                    np.std(shares, ddof=1),
                    floor(min(shares), count["total"]),
                )
                cells = [f"{100 * value:.1f}" for value in row]
                lines.append(f"| {stage} | {name} | {count['total']} | {' | '.join(cells)} |")
    seconds = [sum(result["seconds"].values()) for result in results]
    return [*lines, "", f"{len(results)} seeds; seconds of each: {', '.join(f'{s:.0f}' for s in seconds)}"]


def floor(share: float, n: int) -> float:
    """A share of `n` cases less three of its standard errors, at least 0. One more right and one more wrong
    case are counted in the error: without them none would follow from a share of 0 or 1."""
    smooth = (share * n + 1) / (n + 2)
    return max(0.0, share - 3 * math.sqrt(smooth * (1 - smooth) / n))
