"""An evaluation of a model by lm-evaluation-harness, as files that anyone can repeat: what was asked and
said, the settings, hashes and versions, and a table beside published numbers."""

import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import jax

from mmada_jax import storage
from mmada_jax.files import read_json
from mmada_jax.measure.harness import HarnessModel
from mmada_jax.serve.api import MMaDA
from mmada_jax.storage import write_whole
from mmada_jax.weights import lazy
from mmada_jax.weights.folder import open_folder

RESULTS, ANSWERS, TABLE = "results.json", "answers.jsonl", "results.md"
PACKAGES = ("mmada_jax", "jax", "flax", "lm_eval", "datasets")
# Task -> what the paper of MMaDA says, and what others have measured, in percent (docs/evaluation.md).
PUBLISHED = {"gsm8k": ("73.4", "40.6")}


def evaluate(
    folder: storage.Name,
    tasks: Sequence[str],
    out: storage.Path,
    settings: dict[str, Any],
    *,
    include: str | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Runs tasks of the harness on the model in a folder, or goes on with them: what `out` holds of answers
    isn't asked again. Writes results.json and results.md there. `settings` are those of HarnessModel;
    `include` is a folder with tasks of one's own. Raises ValueError for tasks that aren't known."""
    import lm_eval
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=include)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"unknown tasks: {', '.join(unknown)}; lm-eval ls tasks lists those of the harness, "
            "--include-path names a folder with yours"
        )
    out.mkdir(parents=True, exist_ok=True)
    source = open_folder(folder)
    sha256 = lazy.sha256(source.tensors())
    named = {key: value for key, value in settings.items() if value is not None}
    about = {"sha256": sha256, "settings": named, "chat": chat, "limit": limit}
    if (out / RESULTS).is_file():
        old = read_json(out / RESULTS, dict)
        differs = [name for name, value in about.items() if old.get(name) != value]
        if differs:
            raise ValueError(
                f"{out} holds results of another {' and '.join(differs)}; name another --out, or remove "
                f"{RESULTS} there (answers are kept)"
            )
    model = HarnessModel(MMaDA.load(folder), answers=str(out / ANSWERS), model_hash=sha256, **named)
    found = lm_eval.simple_evaluate(
        model, tasks=list(tasks), num_fewshot=fewshot, limit=limit, task_manager=manager,
        apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=1000, log_samples=False,
    )  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    report = {
        "model": str(source.path), "step": source.step, **about, "versions": versions,
        "devices": [jax.device_count(), jax.devices()[0].device_kind],
        "tasks": {
            task: {
                "counts": found["n-samples"].get(task), "fewshot": found["n-shot"].get(task),
                "version": found["versions"].get(task), "metrics": _plain(found["results"][task]),
            }
            for task in found["results"]
        },
    }  # fmt: skip
    write_whole(out / RESULTS, json.dumps(report, indent=2) + "\n")
    write_whole(out / TABLE, table(report))
    return report


def table(report: dict[str, Any]) -> str:
    """The results in Markdown, beside published numbers where there are some."""
    published = {task: PUBLISHED[task] for task in report["tasks"] if task in PUBLISHED}
    columns = ["task", "metric", "value", "cases"]
    columns += ["MMaDA's paper", "measured by others"] if published else []
    rows = [columns, ["---"] * len(columns)]
    for task, of in report["tasks"].items():
        cases = str((of["counts"] or {}).get("effective", ""))
        for metric, value in of["metrics"].items():
            if "_stderr" not in metric:
                error = of["metrics"].get(metric.replace(",", "_stderr,"))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                known = published.get(task, ("", "")) if published else ()
                rows.append([task, metric, f"{value:.4f}{spread}", cases, *known])
    shots = {task: of["fewshot"] for task, of in report["tasks"].items() if of["fewshot"] is not None}
    settings = report["settings"] | {"chat": report["chat"], "limit": report["limit"], "examples": shots}
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    title = f"# {storage.path(report['model']).name}, sha256 {report['sha256'][:16]}\n"
    table_lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([title, *table_lines, "", f"Settings: {told}. {versions}.\n"])


def _plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers alone, without the number of cases, which stands beside them."""
    numbers = {
        name: x for name, x in metrics.items() if isinstance(x, int | float) and name != "sample_len"
    }
    return {name: float(x) for name, x in numbers.items() if not isinstance(x, bool)}
