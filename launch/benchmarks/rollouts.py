"""Times an iteration of UniGRPO on text with and without a cache in its rollouts.

    mmada bench rollouts --init runs/quickstart/cot
    mmada bench rollouts --init runs/quickstart/cot --block 8 --prompts 4 --new 128

The task is the sums of configs/unigrpo.py:digits, the model is any that can be trained; rewards are left
out, for they are the host's. In turns: a rollout, the scores and the updates that follow it, each with
its own times. `off` is how far the log-probabilities that a cache recorded are from the policy's.
"""

import argparse
import dataclasses
import functools
import time

import jax
import numpy as np

from configs import unigrpo as config_file
from launch.benchmarks import timing
from mmada_jax.devices import sharding
from mmada_jax.train import optim
from mmada_jax.train.rl.resume import state_shapes
from mmada_jax.train.rl.rollout import prompt_ids
from mmada_jax.train.rl.start import load_policy, open_run
from mmada_jax.train.rl.tasks import open_task, rollout_inputs
from mmada_jax.train.rl.update import Chosen, UpdateBatch
from mmada_jax.weights.state import start_state

TASK = "arithmetic"
PARTS = ("rollout", "scores", "updates")


def measure(args: argparse.Namespace) -> dict:
    """Milliseconds of each part of an iteration by cache, and how far what was recorded is off."""
    config = config_file.get_config("digits")
    config.init, config.objective.masking = args.init, args.masking
    del config.tasks.drawing
    task = config.tasks[TASK]
    task.groups = task.update_groups = args.prompts
    task.max_new = args.new
    task.text.update(block=args.block, steps=args.new)
    run, mesh, prompts, rewards = open_run(config.to_dict(), ".")
    model, params, _ = load_policy(run, ".", mesh)
    longest = max(len(prompt_ids(model, run.tasks[TASK], prompt)) for prompt in prompts[TASK])
    if longest + args.new > model.config.max_len:
        raise ValueError(f"{longest} + {args.new} tokens are more than the model's {model.config.max_len}")
    optimizer = optim.make(run.optim, run.iterations * run.objective.mu)
    with jax.set_mesh(mesh):
        _, shardings = state_shapes(run, model, optimizer, mesh)
        sides = {}
        for cache in args.caches:
            rule = dataclasses.replace(run.tasks[TASK].text, cache=cache)
            cached = dataclasses.replace(run, tasks={TASK: dataclasses.replace(run.tasks[TASK], text=rule)})
            opened = open_task(
                cached, TASK, model, prompts[TASK], rewards[TASK], optimizer, mesh, shardings
            )
            state = start_state(jax.tree.map(lambda x: x.copy(), params), optimizer, shardings)
            sides[cache] = Iteration(cached, model, opened, state)
        timing.take_turns({cache: side.run for cache, side in sides.items()}, args.repeats)
    ms = {
        cache: {part: timing.quartiles(side.ms[part][1:]) for part in (*PARTS, "iteration")}
        for cache, side in sides.items()
    }
    return {
        **timing.machine(), "rows": args.prompts * run.objective.responses, "new": args.new,
        "block": args.block, "masking": args.masking, "mu": run.objective.mu, "repeats": args.repeats,
        "ms": ms, "off": {cache: side.off for cache, side in sides.items()},
    }  # fmt: skip


class Iteration:
    """An iteration of a task that can be called again and again, and the times of its parts."""

    def __init__(self, run, model, opened, state):
        self.ms = {part: [] for part in (*PARTS, "iteration")}
        self.off = 0.0
        self._run, self._opened, self._state = run, opened, state
        self._given = rollout_inputs(run, model, opened, 0)[1]
        self._mesh = model.mesh
        R = len(self._given[0])
        advantage_S = np.random.default_rng(0).choice([-1, 1], R).astype(np.float32)
        self._chosen = Chosen(np.arange(R), advantage_S, np.full(R, 1 / R, np.float32))

    def run(self):
        """One iteration, from the same prompts and key; the params move on."""
        mu, root, laps = self._run.objective.mu, jax.random.key(0), [time.perf_counter()]
        rollout = jax.block_until_ready(self._opened.generate(self._state.params, *self._given))
        laps.append(time.perf_counter())
        scored = [self._opened.score(self._state.params, None, rollout, root, n) for n in range(mu)]
        jax.block_until_ready(scored)
        laps.append(time.perf_counter())
        for n in range(mu):
            fresh_S = np.full(len(self._chosen.which_S), n == 0)
            on_mesh = sharding.put_batch(self._mesh, (self._chosen, fresh_S))
            batch = UpdateBatch(scored[n], rollout.tokens_RL, rollout.valid_RL, *on_mesh)
            self._state, _ = jax.block_until_ready(self._opened.update(self._state, root, batch))
        laps.append(time.perf_counter())
        for part, seconds in zip(PARTS, np.diff(laps), strict=True):
            self.ms[part].append(1e3 * seconds)
        self.ms["iteration"].append(1e3 * (laps[-1] - laps[0]))
        off_RL = np.abs(np.asarray(scored[0].old_RL - rollout.logp_RL))
        self.off = float(np.mean(off_RL, where=np.asarray(scored[0].scored_RL)))


def as_text(report: dict) -> str:
    """A line for each cache, the first one being what the others are compared with."""
    first = next(iter(report["ms"].values()))["iteration"]["median"]
    text = functools.partial(timing.as_text, digits=0)
    lines = [
        f"{report['device']}, {report['rows']} rows, {report['new']} new tokens in blocks of "
        f"{report['block']}, masks {report['masking']}, {report['mu']} updates; ms, medians of "
        f"{report['repeats']} (quartiles)"
    ]
    for cache, of in report["ms"].items():
        parts = ", ".join(f"{part} {text(of[part])}" for part in (*PARTS, "iteration"))
        ratio = first / of["iteration"]["median"]
        lines.append(f"cache {cache:6} {parts}: {ratio:.2f} x, off by {report['off'][cache]:.3f} nats")
    return "\n".join(lines)
