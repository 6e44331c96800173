"""Calls in turns, quartiles, and the machine that they were taken on. Only jax is needed, by `machine`."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Seconds of one side: "low", "median", "high" by the clock, "cpu" the median of all cores together.
Times = dict[str, float]


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int | Mapping[str, int],
    warm_up: int = 1,
    pause: float = 0.0,
    called: Callable[[str], None] = lambda name: None,
) -> dict[str, Times]:
    """Calls each run `warm_up` times, then all of them in turns, `repeats` times, so that whatever else the
    machine does hits all; every second turn goes backwards. `pause` seconds lie before each call, in which
    the threads of the call before come to rest. A run that has fewer repeats than others takes part in as
    many turns, from the first one on at equal distances. `called` is told the name of each run after it."""
    for run in runs.values():
        for _ in range(warm_up):
            run()
    times_of = dict(repeats) if isinstance(repeats, Mapping) else dict.fromkeys(runs, repeats)
    turns = max(times_of.values())
    clock, cpu = {name: [] for name in runs}, {name: [] for name in runs}
    for turn in range(turns):
        for name in list(runs) if turn % 2 else reversed(runs):
            if len(clock[name]) * turns > turn * times_of[name]:
                continue
            time.sleep(pause)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            runs[name]()
            clock[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - cpu_begin)
            called(name)
    return {name: quartiles(clock[name]) | {"cpu": statistics.median(cpu[name])} for name in runs}


def quartiles(seconds: list[float]) -> Times:
    """The three quartiles, by name."""
    low, middle, high = statistics.quantiles(seconds, n=4) if seconds[1:] else seconds * 3
    return {"low": low, "median": middle, "high": high}


def in_ms(times: Mapping[str, Times]) -> dict[str, Times]:
    """Seconds -> milliseconds."""
    return {name: {key: 1e3 * value for key, value in of.items()} for name, of in times.items()}


def as_text(ms: Times, digits: int = 1) -> str:
    """`12.3 (12.1 - 12.8)`: the median and the outer quartiles."""
    return f"{ms['median']:.{digits}f} ({ms['low']:.{digits}f} - {ms['high']:.{digits}f})"


def machine() -> dict[str, Any]:
    """Versions, device, cores and threads."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    facts = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cores": cores,
    }
    if (torch := sys.modules.get("torch")) is not None:
        facts |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    return facts
