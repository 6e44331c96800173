#!/usr/bin/env bash
# ASHA of Ray Tune 2.60.0 never stops a trial whose metric is nan. A trial goes on unless its value is worse than the
# cutoff of its rung, and no comparison with nan holds: "nan < cutoff" is false. So the trials that have diverged, which
# early stopping is for, run to their end, while sound ones beside them are stopped. A metric that is nan must be reported
# as a very bad number.
#
# Output seen (losses of five trials at one rung, one of three goes on):
#   0.1 0.2 0.3 5.0 6.0 -> CONTINUE STOP STOP STOP STOP
#   0.1 0.2 0.3 nan nan -> CONTINUE STOP STOP CONTINUE CONTINUE
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray[tune]==2.60.0'
cat >"$folder/show.py" <<'PYTHON'
import math
import sys
import types

from ray.tune.schedulers import ASHAScheduler


def told(losses):
    scheduler = ASHAScheduler(
        time_attr="step", metric="loss", mode="min", max_t=9, grace_period=1, reduction_factor=3
    )
    actions = []
    for number, loss in enumerate(losses):
        trial = types.SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)
        actions.append(scheduler.on_trial_result(None, trial, {"step": 1, "loss": loss}))
    print(*losses, "->", *actions)
    return actions


sound, diverged = told([0.1, 0.2, 0.3, 5.0, 6.0]), told([0.1, 0.2, 0.3, math.nan, math.nan])
sys.exit(not (sound[3:] == ["STOP"] * 2 and diverged[3:] == ["CONTINUE"] * 2))
PYTHON
RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/show.py"
