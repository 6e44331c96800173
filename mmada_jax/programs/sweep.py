"""Trains every trial of a sweep and tables what came of them; run again to resume.

    mmada sweep --config configs/pretrain.py:digits,smoke --workdir runs/sweep
    mmada sweep --config configs/pretrain.py:digits --workdir runs/sweep --parallel 2 \\
        --metric loss_mmu --config.image_tokenizer=../../vq --config.steps=200
    mmada sweep --config configs/pretrain.py:digits --workdir runs/sweep --commands
    mmada sweep --config configs/pretrain.py:digits --workdir runs/search --search optuna --trials 40
    mmada sweep --config configs/pretrain.py:digits --workdir runs/search --engine ray --stop asha \\
        --search random --trials 40 --address auto --parallel 8

The config file says what is varied, beside its get_config; `h` is mmada_jax.train.sweep.Hyper:

    def get_hyper(h):
        return h.product([h.sweep("optim.lr", [1e-3, 3e-3]), h.sweep("mixture.mmu", [8, 17])])

With --search it says what values are drawn from; `s` is mmada_jax.train.sweep.Space:

    def get_space(s):
        return {"optim.lr": s.log_uniform(1e-4, 1e-2), "mixture.mmu": s.integer(4, 24),
                "optim.floor": s.uniform(0.0, 0.2), "optim.name": s.choice(["muon", "adamw"])}

Each trial is a run of `mmada train` in WORKDIR/trial-NNN-..., with its output in log.txt there. Flags
--config.KEY=VALUE are for all trials. WORKDIR/results.csv and results.md are written anew whenever a
trial ends, the plot results.png once a minute at most. Trials that are done or were stopped early are
skipped, others continue from their checkpoints. Exit status 1 if one failed; SIGTERM and Ctrl-C are
passed on, so that all save.

Trials side by side share the machine: each uses all cores, so --parallel pays where one alone leaves
some idle; an accelerator takes one trial at a time. --engine ray runs them by Ray Tune, here or on the
hosts of a running Ray cluster (docs/cluster.md). --commands prints a line of shell per trial; run this
program afterwards for the tables. A relative image_tokenizer is relative to the trial's folder; where
none is named every trial trains its own.
"""

import argparse
import os
import shlex
import sys

from mmada_jax import storage
from mmada_jax.programs.configured import config_parser, parse
from mmada_jax.programs.process import Parser


def main(argv: list[str]) -> None:
    """Plans all trials, then prints or runs them."""
    args = parse(_parser(), argv)
    _check(args)

    from mmada_jax.train import running, sweep, tune

    tune.require(ray=args.engine == "ray", optuna=args.search == "optuna")
    resources = tune.parse_resources(args.resources)
    workdir, path = storage.path(args.workdir), args.source.partition(":")[0]
    program, config = [args.program] if args.program else list(sweep.TRAIN), args.config.to_dict()

    def plan(varied):
        trials = sweep.plan(config, varied, workdir, [*program, "--config", args.source], args.overrides)
        sweep.check_unchanged(workdir, trials)
        return trials

    def propose(trials):
        settings = tune.propose(space, trials, args.metric, args.seed)
        return plan([*(trial.overrides for trial in trials), settings])[-1]

    if args.search:
        space = sweep.get_space(path)
        sweep.check_space(config, space, args.overrides, args.trials)
        trials = plan(sweep.draw_sweep(space, args.trials, args.seed)) if args.search == "random" else []
    else:
        trials = plan(sweep.get_sweep(path))
    stop = tune.parse_stop(
        args.stop, args.grace, args.reduction, trials or sweep.plan(config, [{}], workdir, [], {})
    )
    if args.commands:
        for trial in trials:
            words = trial.command[len(program) :]
            print(shlex.join([*(["python", *program] if args.program else ["mmada", "train"]), *words]))
        return
    with sweep.lock(workdir) as held:
        if args.search == "optuna":
            known = plan(sweep.begun(workdir, space))
            all_of_them = running.Sweep(known, workdir, args.metric, args.trials, propose)
        else:
            all_of_them = running.Sweep(trials, workdir, args.metric)
        if args.engine == "plain" or not all_of_them.left:
            sys.exit(running.run(all_of_them, args.parallel, held))
        with tune.joined(workdir, args.address) as alone:
            resources = tune.share(resources, alone, args.parallel)
            code = tune.run(all_of_them, args.parallel, resources, stop)
        sys.exit(code)


def _parser() -> Parser:
    parser = config_parser(__doc__, "sweep", "where the trials' folders and the tables go")
    parser.add_argument("--parallel", type=int, default=1, metavar="N",
                        help="how many trials run at a time (default: 1)")  # fmt: skip
    parser.add_argument("--metric", default="loss", metavar="NAME", help="by which the tables are sorted, "
                        "lowest first; -NAME: highest first (default: loss)")  # fmt: skip
    parser.add_argument("--commands", action="store_true",
                        help="print one command per trial; run and write nothing")  # fmt: skip
    parser.add_argument("--program", metavar="FILE", help="what trains: a Python file that takes the flags "
                        "of mmada train, which is the default, and writes its metrics.jsonl")  # fmt: skip
    group = parser.add_argument_group("search")
    group.add_argument("--search", choices=("random", "optuna"), help="draw from the file's get_space, at "
                       "random or by what earlier trials reached (Optuna's TPE)")  # fmt: skip
    group.add_argument("--trials", type=int, metavar="N", help="how many settings are drawn")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    group = parser.add_argument_group("Ray")
    group.add_argument("--engine", choices=("plain", "ray"), default="plain",
                       help="what runs the trials: this program (the default) or Ray Tune")  # fmt: skip
    group.add_argument("--address", metavar="HOST:PORT", help="the Ray cluster to join, or auto (default: "
                       "RAY_ADDRESS, or one that is started here for the sweep)")  # fmt: skip
    group.add_argument("--resources", default="", metavar="CPU=N,GPU=N", help="what a trial gets (default: "
                       "a whole host; without a cluster its share of this machine)")  # fmt: skip
    group.add_argument("--stop", choices=("asha",), help="stop trials early that are worse than most at "
                       "the same step (asynchronous successive halving)")  # fmt: skip
    group.add_argument("--grace", type=int, metavar="STEPS",
                       help="no trial is stopped before (default: a ninth of its steps)")  # fmt: skip
    group.add_argument("--reduction", type=float, default=3, metavar="R", help="one of R trials goes on at "
                       "STEPS, at R x STEPS and so on (default: 3)")  # fmt: skip
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that mean nothing, or nothing together."""
    if args.parallel < 1:
        raise ValueError(f"--parallel is {args.parallel}; it must be at least 1")
    if args.program and not os.path.isfile(args.program):
        raise FileNotFoundError(f"no program {args.program}; name a Python file, as launch/train.py")
    if args.search and (args.trials or 0) < 1:
        raise ValueError(f"--search {args.search} needs --trials N, at least 1")
    if args.trials is not None and not args.search:
        raise ValueError("--trials is for --search; get_hyper lists the trials itself")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0")
    if args.commands and args.search == "optuna":
        raise ValueError("--commands can't list what Optuna will propose; choose --search random")
    if args.engine == "plain" and (
        needless := [n for n in ("stop", "address", "resources") if getattr(args, n)]
    ):
        raise ValueError(f"--{needless[0]} is for Ray; add --engine ray")
    if args.grace is not None and not args.stop:
        raise ValueError("--grace is for --stop asha")
