"""Sweeps by Ray Tune, and settings that Optuna proposes. Nothing else imports these two libraries.

Our own folders are the record of a sweep. Tuner.restore isn't used: it would need Ray's state and Optuna's,
which a kill at the wrong moment leaves older than the trials. A sweep that is started again is a new run of
Tune: it gets the trials that haven't ended, its scheduler the rows of those that have, and what Optuna
proposes is computed from the seed, the number of the trial and the results so far.
"""

import contextlib
import importlib.util
import logging
import math
import os
import pathlib
import shutil
import signal
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmada_jax import cluster, storage
from mmada_jax.train.running import ROOT, Attempt, Sweep, signals, stand_in
from mmada_jax.train.sweep import Choice, Domains, Overrides, Trial, draw, fresh, lock_trial

# A diverged trial: ASHA never stops a nan, since no comparison with it holds.
_WORST = 1e30
_RECORDS = ".ray_tune"
_PATIENCE = 60  # seconds that a trial has to save before another attempt takes its folder
# Runs the command behind it, which gets SIGTERM, and so saves, when the process that started it ends or
# sends it. A worker of Ray that ends kills its children (kill -9), but not theirs. SIGINT, which Ray blocks
# in its processes, is let through again.
_ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
libc, parent, child = ctypes.CDLL(None), int(sys.argv[1]), 0
def follow(parent):
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda *_: child and os.kill(child, signal.SIGTERM))
signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGTERM])
me = os.getpid()
child = os.fork()
if not child:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    follow(me)
    os.execv(sys.argv[2], sys.argv[2:])
follow(parent)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def require(ray: bool, optuna: bool) -> None:
    """Raises ImportError, which says what to install, if a library that is needed isn't there."""
    if ray:
        cluster.require("--engine ray")
    if optuna and importlib.util.find_spec("optuna") is None:
        raise ImportError("--search optuna needs Optuna: pip install 'mmada_jax[cluster]'")


# ---- Optuna --------------------------------------------------------------------------------------


def propose(space: Domains, trials: Sequence[Trial], metric: str, seed: int) -> Overrides:
    """Settings for the trial that follows `trials`, by Optuna's TPE sampler from how they ended.

    It depends on nothing else. The first ten are random, as Optuna has it."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = optuna.distributions

    def distribution(domain):
        if isinstance(domain, Choice):
            return kinds.CategoricalDistribution(range(len(domain.values)))
        if domain.whole:
            return kinds.IntDistribution(domain.low, domain.high)
        return kinds.FloatDistribution(domain.low, domain.high, log=domain.log)

    distributions = {key: distribution(domain) for key, domain in space.items()}
    name, state = metric.removeprefix("-"), optuna.trial.TrialState
    known = []
    for trial in trials:
        status = trial.record["status"]
        if status not in ("done", "stopped early"):
            continue
        params = {
            key: domain.values.index(trial.overrides[key])
            if isinstance(domain, Choice)
            else trial.overrides[key]
            for key, domain in space.items()
        }
        values = trial.values
        value = values.get(name, math.nan)
        finite = math.isfinite(value)
        # A trial that is pruned without a value is worse than all others.
        if finite and status == "done":
            of = {"value": value, "state": state.COMPLETE}
        else:
            seen = {values["step"]: value} if finite else {}
            of = {"intermediate_values": seen, "state": state.PRUNED}
        known.append(optuna.trial.create_trial(params=params, distributions=distributions, **of))

    def make(attempt):
        if attempt >= 50:  # TPE has settled on settings that are known
            return draw(space, len(trials), seed, attempt)
        # Seeds by number, not one stream, so that a proposal doesn't depend on which were made before it.
        (number,) = _np_seed(seed, len(trials), attempt)
        study = optuna.create_study(
            direction="maximize" if metric.startswith("-") else "minimize",
            sampler=optuna.samplers.TPESampler(seed=number),
        )
        study.add_trials(known)
        params = study.ask(distributions).params
        return {
            key: domain.values[params[key]] if isinstance(domain, Choice) else domain.fit(params[key])
            for key, domain in space.items()
        }

    return fresh([trial.overrides for trial in trials], make)


def _np_seed(*numbers: int) -> list[int]:
    import numpy as np

    return [int(n) for n in np.random.SeedSequence(numbers).generate_state(1)]


# ---- Ray -----------------------------------------------------------------------------------------


def parse_resources(text: str) -> dict[str, float]:
    """`CPU=4,GPU=1` -> {"CPU": 4.0, "GPU": 1.0}."""
    resources = {}
    for part in filter(None, text.split(",")):
        kind, _, count = part.partition("=")
        try:
            resources[kind.strip()] = float(count)
        except ValueError:
            resources[kind.strip()] = -1.0
        if not kind.strip() or not 0 < resources[kind.strip()] < math.inf:
            raise ValueError(f"--resources has {part!r}; write kinds and counts above 0, as CPU=4,GPU=1")
    return resources


def parse_stop(
    stop: str | None, grace: int | None, reduction: float, trials: Sequence[Trial]
) -> dict[str, float] | None:
    """What `run` needs to stop trials early, or None if it isn't to."""
    if not stop:
        return None
    steps = max(trial.config["steps"] for trial in trials)
    grace = max(1, steps // 9) if grace is None else grace
    if not 1 <= grace <= steps:
        raise ValueError(f"--grace is {grace}; it must be from 1 to the {steps} steps of a trial")
    if not 1 < reduction < math.inf:
        raise ValueError(f"--reduction is {reduction}; it must be above 1")
    return {"grace": grace, "reduction": reduction, "steps": steps}


@contextlib.contextmanager
def joined(workdir: storage.Path, address: str) -> Iterator[bool]:
    """Joins a Ray cluster, or starts one for the block, as mmada_jax.cluster does. Yields whether it was
    started. Tune keeps its records in WORKDIR/.ray_tune meanwhile, where all hosts see them."""
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_WARN_THRESHOLD_S": "60", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "RAY_AIR_NEW_OUTPUT": "0",  # the new output isn't silent with verbose=0
        # Where memory runs short Ray would kill its workers, which are small; trials aren't known to it.
        "RAY_memory_monitor_refresh_ms": "0",
        # Workers find the package as this program does.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    records = _storage_of(workdir) / _RECORDS
    shutil.rmtree(records, ignore_errors=True)  # of a sweep that was killed
    # Ray's processes inherit it: a terminal that closes would end them before the trials are told to save.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cluster.connected(address) as alone:
            signal.signal(signal.SIGHUP, before)
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we tell errors in one line
            yield alone
    finally:
        signal.signal(signal.SIGHUP, before)
        shutil.rmtree(records.parent if storage.in_bucket(workdir) else records, ignore_errors=True)


def _storage_of(workdir: storage.Path) -> pathlib.Path:
    """Where Tune keeps its records, which nobody reads: in the workdir, where all hosts see them. Those of
    a workdir in a bucket stay on this machine."""
    if not storage.in_bucket(workdir):
        return workdir.resolve()
    return stand_in(workdir)


def share(asked: Mapping[str, float], alone: bool, parallel: int) -> dict[str, float]:
    """What a trial gets: what is asked for; otherwise the CPUs, GPUs and TPUs of a host, or its share of
    this machine if that is `alone`. Raises ValueError if this machine hasn't what is asked for."""
    import ray

    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = {kind: max(host.get(kind, 0) for host in hosts) for kind in {*asked, "CPU", "GPU", "TPU"}}
    for kind, count in asked.items():
        if count > most[kind]:
            text = f"a trial gets {count:g} {kind} by --resources; the largest host has {most[kind]:g}"
            if alone:
                raise ValueError(f"{text}; lower it")
            print(f"warning: {text}; trials wait for one that has more", flush=True)
    among = parallel if alone else 1
    shares = {kind: count // among or count / among for kind, count in most.items()}
    return dict(asked) or {kind: count for kind, count in shares.items() if count}


def run(
    sweep: Sweep, parallel: int, resources: Mapping[str, float], stop: Mapping[str, float] | None
) -> int:
    """Runs the trials that are to run by Ray Tune, within `joined`, and returns the exit status.

    `stop`: grace and reduction of ASHA, if it is to stop trials early."""
    import ray
    from ray import tune

    of: dict[str, Trial] = {}  # by Tune's number of the trial
    with signals() as received:
        tuner = tune.Tuner(
            tune.with_resources(_trainable(), tune.PlacementGroupFactory([dict(resources)])),
            tune_config=tune.TuneConfig(
                num_samples=-1, search_alg=_searcher(sweep, of, parallel), reuse_actors=False,
                scheduler=_asha(sweep, of, **stop) if stop else None,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=_RECORDS, storage_path=str(_storage_of(sweep.workdir)), verbose=0,
                stop=_stopper(received), callbacks=[_callback(sweep, of)],
                failure_config=tune.FailureConfig(max_failures=3),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except (RuntimeError, ray.exceptions.RayError) as error:
            reason = str(error).split("\n")[0]
            text = f"Ray has failed ({reason}); run again, and trials go on from their last save"
            raise ConnectionError(text) from error
        for trial in list(sweep.running):  # a signal
            at = f"{trial.values['step']}/{trial.config['steps']}"
            sweep.end(trial, f"{trial.record['status']} at step {at}")
    return sweep.finish(received)


def _trainable() -> type:
    """What Tune calls a trainable: it starts a trial in a worker of Ray, and reports its metrics."""
    from ray import tune

    class Run(tune.Trainable):
        def setup(self, config):
            os.chdir(config["folder"])  # paths in commands are relative to it
            self._trial, self._metric = config["trial"], config["metric"]
            self._seen, self._rows, self._reported, self._attempt = None, [], 0, None
            with lock_trial(self._trial.folder, _PATIENCE) as held:
                before = (sys.executable, "-I", "-S", "-c", _ENDS_WITH_PARENT, str(os.getpid()))
                self._attempt = Attempt(self._trial, held, before, config["environment"])

        def step(self):
            until = time.monotonic() + 1  # Tune stops a trial between two calls only
            while True:
                ended = self._attempt.process.poll() is not None
                rows = self._new_rows(ended)
                result = rows[0] if rows else {}
                self._reported = result.get("step", self._reported)
                if ended and len(rows) < 2:
                    attempt, self._attempt = self._attempt, None
                    return result | {"done": True, "told": attempt.end(self._metric)}
                if result or time.monotonic() > until:
                    return result
                # Metrics come into a bucket every ten seconds, and each look is a request.
                time.sleep(2 if storage.in_bucket(self._trial.folder) else 0.1)

        def _new_rows(self, ended):
            # The last row is held back until the trial has ended: it saves first.
            path = self._trial.folder / "metrics.jsonl"
            if path.is_file() and (seen := path.stat()) != self._seen:
                self._seen, self._rows = seen, self._trial.rows
            last = math.inf if ended else self._trial.config["steps"]
            rows = [row for row in self._rows if self._reported < row["step"] < last]
            return [report for row in rows if (report := reported(row, self._metric))]

        def cleanup(self):
            if self._attempt:  # Tune stops the trial
                self._attempt.process.terminate()
                self._attempt.process.wait()
                self._attempt.end(self._metric, early=self._trial.record["status"] == "stopped early")

    return Run


def reported(row: Mapping[str, float], metric: str) -> dict[str, float]:
    """What Tune gets to know of a row of metrics: nothing if it lacks the metric."""
    name = metric.removeprefix("-")
    if name not in row:
        return {}
    worst = -_WORST if metric.startswith("-") else _WORST
    return {"step": row["step"], "metric": row[name] if math.isfinite(row[name]) else worst}


def _searcher(sweep: Sweep, of: dict[str, Trial], parallel: int) -> Any:
    """What Tune asks for the next trial."""
    from ray.tune.search import Searcher

    class Next(Searcher):
        def suggest(self, trial_id):
            if len(sweep.running) >= parallel:
                return None
            trial = sweep.take()
            if trial is None:
                return Searcher.FINISHED
            of[trial_id] = trial
            # Ray sets a number of threads for OpenMP, and its token isn't for trials.
            threads = os.environ.get("OMP_NUM_THREADS")
            environment = {"OMP_NUM_THREADS": threads, "RAY_AUTH_TOKEN": None}
            here = {"metric": sweep.metric, "folder": os.getcwd(), "environment": environment}
            return {"trial": trial, **here}

        def on_trial_complete(self, trial_id, result=None, error=False):
            pass

        def save(self, checkpoint_path):
            pass

        def restore(self, checkpoint_path):
            pass

    return Next()


def _asha(sweep: Sweep, of: dict[str, Trial], grace: int, reduction: float, steps: int) -> Any:
    """ASHA, which knows the rows of trials that have ended."""
    from ray.tune.schedulers import ASHAScheduler

    class Asha(ASHAScheduler):
        def on_trial_result(self, controller, trial, result):
            action = super().on_trial_result(controller, trial, result)
            if action == self.STOP:
                of[trial.trial_id].note("stopped early")  # it counts even if this process is killed now
            return action

    scheduler = Asha(
        time_attr="step", metric="metric", mode="max" if sweep.metric.startswith("-") else "min",
        max_t=steps, grace_period=grace,
        reduction_factor=reduction, stop_last_trials=False,
    )  # fmt: skip
    for trial in sweep.ended:
        stand_in = types.SimpleNamespace(trial_id=trial.folder.name)
        scheduler.on_trial_add(None, stand_in)
        for row in trial.rows:
            ASHAScheduler.on_trial_result(scheduler, None, stand_in, reported(row, sweep.metric))
    return scheduler


def _stopper(received: Sequence[int]) -> Any:
    """Stops all trials when a signal was received."""
    from ray import tune

    class Stop(tune.Stopper):
        def __call__(self, trial_id, result):
            return False

        def stop_all(self):
            return bool(received)

        def __deepcopy__(self, memo):
            return self

    return Stop()


def _callback(sweep: Sweep, of: dict[str, Trial]) -> Any:
    """Tells how trials end."""
    from ray import tune

    class Tell(tune.Callback):
        def on_trial_complete(self, iteration, trials, trial, **info):
            ours, told = of[trial.trial_id], trial.last_result.get("told")
            if not told and ours.record["status"] == "stopped early":
                told = f"stopped early at step {ours.values['step']}/{ours.config['steps']}"
            if told:
                sweep.end(ours, told)

        def on_trial_error(self, iteration, trials, trial, **info):
            ours = of[trial.trial_id]
            ours.note("failed")
            reason = str(trial.get_error() or "its worker was lost").strip().split("\n")[-1]
            sweep.end(ours, f"failed: {reason}")

    return Tell()
