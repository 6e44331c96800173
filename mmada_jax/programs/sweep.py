"""Trains every trial of a sweep and tables what came of them; run again to resume.

    mmada sweep --config configs/pretrain.py:digits,smoke --workdir runs/sweep
    mmada sweep --config configs/pretrain.py:digits --workdir runs/sweep --parallel 2 \\
        --metric loss_mmu --config.image_tokenizer=../../vq --config.steps=200
    mmada sweep --config configs/pretrain.py:digits --workdir runs/sweep --commands

The config file says what is varied, beside its get_config; `h` is mmada_jax.train.sweep.Hyper:

    def get_hyper(h):
        return h.product([h.sweep("optim.lr", [1e-3, 3e-3]), h.sweep("mixture.mmu", [8, 17])])

Each trial is a run of `mmada train` in WORKDIR/trial-NNN-..., with its output in log.txt there. Flags
--config.KEY=VALUE are for all trials. WORKDIR/results.csv and results.md are written anew whenever a
trial ends. Trials that are done are skipped, others continue from their checkpoints. Exit status 1 if
one failed; SIGTERM and Ctrl-C are passed on, so that all save.

Trials side by side share the machine: each uses all cores, so --parallel pays where one alone leaves
some idle; an accelerator takes one trial at a time. For many machines --commands prints a line of shell
per trial; run this program afterwards for the tables. A relative image_tokenizer is relative to the
trial's folder; where none is named every trial trains its own.
"""

import os
import pathlib
import shlex
import sys

from mmada_jax.programs.configured import config_parser, parse


def main(argv: list[str]) -> None:
    """Plans all trials, then prints or runs them."""
    parser = config_parser(__doc__, "sweep", "where the trials' folders and the tables go")
    parser.add_argument("--parallel", type=int, default=1, metavar="N",
                        help="how many trials run at a time (default: 1)")  # fmt: skip
    parser.add_argument("--metric", default="loss", metavar="NAME", help="by which the tables are sorted, "
                        "lowest first; -NAME: highest first (default: loss)")  # fmt: skip
    parser.add_argument("--commands", action="store_true",
                        help="print one command per trial; run and write nothing")  # fmt: skip
    parser.add_argument("--program", metavar="FILE", help="what trains: a Python file that takes the flags "
                        "of mmada train, which is the default, and writes its metrics.jsonl")  # fmt: skip
    args = parse(parser, argv)
    if args.parallel < 1:
        raise ValueError(f"--parallel is {args.parallel}; it must be at least 1")
    if args.program and not os.path.isfile(args.program):
        raise FileNotFoundError(f"no program {args.program}; name a Python file, as launch/train.py")

    from mmada_jax.train import sweep

    workdir = pathlib.Path(args.workdir)
    varied = sweep.get_sweep(args.source.partition(":")[0])
    program = [args.program] if args.program else list(sweep.TRAIN)
    trials = sweep.plan(
        args.config.to_dict(), varied, workdir, [*program, "--config", args.source], args.overrides
    )
    sweep.check_unchanged(workdir, trials)
    if args.commands:
        for trial in trials:
            words = trial.command[len(program) :]
            print(shlex.join([*(["python", *program] if args.program else ["mmada", "train"]), *words]))
        return
    with sweep.lock(workdir) as held:
        sys.exit(sweep.run(trials, workdir, args.parallel, args.metric, held))
