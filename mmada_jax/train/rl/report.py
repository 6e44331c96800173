"""What people see of a run: its metrics, where the time went, and transcripts of responses."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmada_jax.data.images import png_of
from mmada_jax.nets import vq
from mmada_jax.train.rl.prompts import Prompt
from mmada_jax.train.rl.tasks import OpenTask
from mmada_jax.train.rl.unigrpo import Rollout

# Metrics of a task in every progress line, and beginnings of the names of counts that are shown where they
# aren't 0.
SHOWN = ("reward", "groups_that_differ", "response_length", "kl", "clip_fraction")
SHOWN_COUNTS = ("failed_", "skipped")


class Laps:
    """Seconds of the parts of an iteration, by the name of the part."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def end(self, name: str) -> None:
        """Ends a part, which began when the part before ended."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


# A reward that is equal within so large a share of the groups teaches next to nothing.
FLAT = 0.9


def remarks(task: str, each: Mapping[str, np.ndarray], groups: int, told: set[str]) -> list[str]:
    """A line for each reward [R] that is the same for all responses in most groups, with what helps. A
    reward whose name is in `told` has had its line; those that get one now are added."""
    lines = []
    for reward, value_R in each.items():
        flat = int(np.sum(np.ptp(np.asarray(value_R).reshape(groups, -1), axis=1) == 0))
        if flat >= FLAT * groups and f"{task} {reward}" not in told:
            told.add(f"{task} {reward}")
            lines.append(
                f"{task}: the reward {reward!r} is the same for all responses in {flat} of {groups} "
                "groups, which teach nothing by it. Raise the temperature or config.objective.responses, "
                "choose prompts that are neither too easy nor too hard, or leave it out once it is learned"
            )
    return lines


def rollout_metrics(
    opened: OpenTask,
    host: Rollout,
    each: Mapping[str, np.ndarray],
    updates: list[dict[str, Any]],
    laps: Laps | None,
) -> dict[str, float]:
    """Metrics of a rollout (arrays of the host), the rewards [R] of `each` name, and the inner updates.

    Speeds are in tokens per second: generated ones of a rollout, valid ones of all inner updates. Without
    `laps` they are left out: where parts overlap or something was compiled they mean nothing.
    """
    response_RL = host.response_RL
    length_R = response_RL.sum(axis=1)
    out = {name: np.mean([values[name] for values in updates]) for name in updates[0]}
    out |= {f"reward_{reward}": np.mean(value_R) for reward, value_R in each.items()}
    out |= {f"failed_{reward}": n for reward, n in opened.rewards.failures.items()}
    if opened.task.layout == "mmu":
        out["failed_images"] = len(opened.unreadable)
    out |= {"response_length": length_R.mean(), "entropy": host.entropy_RL[response_RL].mean()}
    if laps is None:
        return out
    updated = len(updates) * host.valid_RL.sum() * opened.task.kept / opened.task.groups
    return out | {
        "rollout_tokens_per_second": length_R.sum() / laps.seconds["rollout"],
        "update_tokens_per_second": updated / laps.seconds["updates"],
    }


def shown_names(values: Mapping[str, float], task: str) -> list[str]:
    """The names of the metrics that a progress line shows; they begin with the task and a slash."""
    counts = [name for name, n in values.items() if n and name.split("/")[-1].startswith(SHOWN_COUNTS)]
    return [f"{task}/{name}" for name in SHOWN] + counts


def transcripts(
    asked: Sequence[Prompt],
    responses: tuple[list[str], np.ndarray | None],
    total_R: np.ndarray,
    each: Mapping[str, np.ndarray],
    G: int,
) -> tuple[bytes, bytes]:
    """The G responses to each of the first four prompts: Markdown, and their images as a PNG with a row of
    images for each prompt, empty if there are no images."""
    texts, images = responses
    lines, n = [], 4 * G
    for i, (prompt, text) in enumerate(zip(asked[:n], texts[:n], strict=True)):
        if i % G == 0:
            lines.append(f"\n## {prompt.text}\n\nanswer: {prompt.answer}\n\n")
        parts = ", ".join(f"{name} {value_R[i]:.3g}" for name, value_R in each.items())
        lines.append(f"- {total_R[i]:.3g} ({parts}) {text!r}\n")
    png = b""
    if images is not None:
        grid = vq.to_uint8(images[:n])
        grid = np.concatenate(
            [np.concatenate(list(grid[i : i + G]), axis=1) for i in range(0, len(grid), G)]
        )
        png = png_of(Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid))
    return "".join(lines).encode(errors="replace"), png
