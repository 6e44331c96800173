"""The loop of reinforcement learning: a rollout and its rewards, then inner updates on it, over and over.

Three jitted functions of each task do the work: generate, score, update. Each compiles once. All that is
random is a function of (seed, iteration), so a resumed run repeats to the bit what an uninterrupted run
does. The functions are made elsewhere (`tasks`); here is only the order in which they are called.
"""

import contextlib
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmada_jax import storage
from mmada_jax.devices import sharding
from mmada_jax.devices.distributed import connect_axes, together, watch_signals
from mmada_jax.ranges import warn_without_effect
from mmada_jax.train import optim
from mmada_jax.train.metrics import Metrics, tell, warn
from mmada_jax.train.rl.report import Laps, remarks, rollout_metrics, shown_names, transcripts
from mmada_jax.train.rl.resume import (
    InFlight,
    frozen_reference,
    resume,
    state_shapes,
    to_checkpoint,
)
from mmada_jax.train.rl.rollout import read_responses
from mmada_jax.train.rl.start import check_same_run, check_tasks, load_policy, open_run, write_workdir
from mmada_jax.train.rl.tasks import judge, open_task, rollout_inputs
from mmada_jax.train.rl.update import UpdateBatch, choose, policy_of
from mmada_jax.train.runs import same_in_all
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.state import TrainState, init_state, start_state
from mmada_jax.weights.workdir import refuse_busy


def train(config: Mapping[str, Any], workdir: storage.Name, allow_code: str = "") -> TrainState:
    """Trains until `config.iterations`, from the newest checkpoint of the workdir if there is one.

    Raises ValueError or OSError for whatever doesn't fit, before any compute. SIGTERM and Ctrl-C save
    when the iteration is complete and return. Where there are several processes, all call this; the
    first one computes the rewards, writes and prints. `allow_code` is that of `open_run`.
    """
    # ---- Configuration --------------------------------------------------------------------------
    began = time.perf_counter()
    workdir = storage.path(workdir)
    with together("reinforcement learning") as same:
        run, mesh, prompts, rewards = open_run(config, workdir, allow_code)
        refuse_busy(workdir)
        same |= same_in_all(run, workdir)
    connect_axes(mesh)
    with together("loading the model"):
        model, params, images = load_policy(run, workdir, mesh)
        check_tasks(run, model, prompts, rewards)
    first_process = jax.process_index() == 0
    say = tell if first_process else lambda *_: None
    if first_process:
        warn_without_effect(run)

    # ---- State ----------------------------------------------------------------------------------
    mu = run.objective.mu
    optimizer = optim.make(run.optim, run.iterations * mu)
    root = jax.random.key(run.seed)
    with (
        watch_signals(mesh) as signalled,  # until the last save is complete
        Checkpoints(workdir, run.keep) as checkpoints,
        ThreadPoolExecutor(1) as pool,
        contextlib.ExitStack() as stack,
        jax.set_mesh(mesh),
    ):
        for combined in rewards.values():
            stack.enter_context(combined)
        # Once more, now that the workdir is ours: another run may have ended in it since the first check.
        check_same_run(run, workdir)
        write_workdir(run, workdir, model, images)
        shapes, shardings = state_shapes(run, model, optimizer, mesh)
        tasks = {
            name: open_task(run, name, model, prompts[name], rewards[name], optimizer, mesh, shardings)
            for name in run.tasks
        }
        frozen = [params] if run.lora.rank else []
        if checkpoints.latest() is not None:
            state, reference, ahead = resume(run, model, tasks, checkpoints, shapes, shardings)
        else:
            reference, ahead = frozen_reference(params, run), None
            if run.lora.rank:
                init = next(iter(tasks.values())).objective.init_params
                state = init_state(jax.random.fold_in(root, 0), init, optimizer, shardings)
            else:
                state = start_state(params, optimizer, shardings)
        del params  # the updates donate their memory
        anchor = frozen[0] if frozen and run.objective.kl == "reference" else reference
        first = int(state.step) // mu
        if first >= run.iterations:
            say(f"{workdir}: {first} iterations are done already")
            return state
        say(
            f"{workdir}: {run.objective.masking}, mesh {dict(mesh.shape)}, "
            + (f"resuming at iteration {first}" if first else f"starting from {run.init}")
        )

        # ---- Loop: rollout and rewards ----------------------------------------------------------
        def policy():
            return policy_of(run, state.params, *frozen or [None])

        def roll(iteration):
            opened = tasks[run.turn(iteration)[0]]
            asked, given = rollout_inputs(run, model, opened, iteration)
            return InFlight(asked, opened.generate(policy(), *given), None)

        def score(iteration, rollout):
            opened = tasks[run.turn(iteration)[0]]
            key = jax.random.fold_in(jax.random.fold_in(root, 3), iteration)
            return [opened.score(policy(), anchor, rollout, key, n) for n in range(mu)]

        with Metrics(workdir, run.iterations, first, began=began) as metrics:
            compiled: set[str] = set()
            told: set[str] = set()
            for iteration in range(first, run.iterations):
                name, _ = run.turn(iteration)
                opened = tasks[name]
                # The first turn of a task compiles its functions; its speed would be the compiler's.
                calls = {f"updates of {name}", f"rollouts of {run.turn(iteration + run.ahead)[0]}"}
                compiles, compiled = not calls <= compiled, compiled | calls
                laps = Laps()
                asked, rollout, scored = ahead or roll(iteration)
                host = multihost_utils.process_allgather(rollout, tiled=True)
                laps.end("rollout")
                responses = read_responses(model, opened.task, opened.at, host.tokens_RL)
                judged = pool.submit(judge, opened, asked, responses)
                # Old log-probabilities belong to the policy that made the rollout, so they are computed
                # before any update. The devices do this while the host computes the rewards.
                scored = scored or score(iteration, rollout)
                if run.ahead:
                    upcoming = roll(iteration + 1)
                    ahead = upcoming._replace(scored=score(iteration + 1, upcoming.rollout))
                jax.block_until_ready(scored)
                laps.end("scores")
                with metrics.waiting():
                    total_R, each = judged.result()
                if jax.process_count() > 1:
                    total_R, each = multihost_utils.broadcast_one_to_all((total_R, each))
                laps.end("rewards")

                # ---- Inner updates --------------------------------------------------------------
                chosen, values = choose(run, opened.task, total_R)
                of_updates = []
                for n in range(mu):
                    # With `ahead` the policy has been updated since it made this rollout.
                    fresh_S = np.full(chosen.which_S.shape, n == 0 and not run.ahead)
                    on_mesh = sharding.put_batch(mesh, (chosen, fresh_S))
                    batch = UpdateBatch(scored[n], rollout.tokens_RL, rollout.valid_RL, *on_mesh)
                    state, of_update = opened.update(state, root, batch, *frozen)
                    of_updates.append(of_update)
                of_updates = jax.device_get(of_updates)
                laps.end("updates")

                # ---- What there is to see -------------------------------------------------------
                done, stop = iteration + 1, int(signalled())
                log = done % run.log_every == 0 or done == run.iterations
                save = done % run.save_every == 0 or done == run.iterations or stop
                if compiles:
                    metrics.restart_clock(done)
                if log:
                    values |= rollout_metrics(
                        opened, host, each, of_updates, None if run.ahead or compiles else laps
                    )
                    values["seconds_waiting_for_rewards"] = laps.seconds["rewards"]
                    values = {f"{name}/{key}": float(value) for key, value in values.items()}
                    shown = shown_names(values, name)
                    values["lr"] = optim.learning_rate(run.optim, run.iterations * mu, state.opt_state)
                    values["failed_saves"] = checkpoints.failed
                    metrics.write(done, values, opened.at.row * len(host.tokens_RL), shown)
                    for line in remarks(name, each, opened.task.groups, told) if first_process else ():
                        warn(line)
                # One iteration of every task is shown: the first ones of a round of `samples_every`.
                if run.samples_every and iteration % run.samples_every < len(run.cycle) and first_process:
                    text, png = transcripts(asked, responses, total_R, each, run.objective.responses)
                    metrics.save_samples(done, text, png, name)

                # ---- Checkpoint -----------------------------------------------------------------
                if log or save:
                    streak = optim.check_streak(run.optim, state.opt_state, checkpoints.give_up)
                    # A run that may be about to end in an error isn't saved, so that the next start resumes
                    # before the trouble. If it is stopped now, it is saved, unless the newest checkpoint
                    # has as many accepted updates.
                    sound = not streak and np.isfinite(of_updates[-1]["loss"])
                    if stop and not sound:
                        sound = checkpoints.accepted() != int(state.opt_state.accepted)
                    if save and (sound or done == run.iterations):
                        with metrics.pausing():
                            metrics.flush()
                            checkpoints.save(to_checkpoint(state, reference, ahead))
                if stop:
                    name = signal.Signals(stop).name
                    say(f"stopped by {name} after iteration {done}; run again to resume")
                    break
    return state
