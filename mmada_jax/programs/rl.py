"""Reinforcement learning of a model by a config; run again to resume.

    mmada rl --config configs/unigrpo.py:digits --workdir runs/rl --config.init=../quickstart/cot
    mmada rl --config configs/unigrpo.py:digits --workdir runs/rl --diagnose \\
        --config.init=../quickstart/cot --maskings unigrpo,trace,exact --batches 6

--diagnose trains nothing and writes nothing: it measures, at the model in config.init, how well the
gradient under each masking repeats itself from batch to batch, and how well it agrees with the gradient
over every reveal of every rollout. It takes one process. Where several train, they find each other as
those of `mmada train` do. --allow_code runs a file of yours, with your rights, in processes of its own.
"""

import functools

from mmada_jax.programs.configured import add_processes, config_parser, connect, parse


def main(argv: list[str]) -> None:
    """Trains, or measures gradients and prints a table."""
    parser = config_parser(__doc__, "rl", "where checkpoints and metrics go")
    parser.add_argument("--diagnose", action="store_true", help="measure the gradients of maskings")
    parser.add_argument("--maskings", help="what --diagnose compares, with commas (default: all)")
    parser.add_argument("--batches", type=int, default=6, metavar="N",
                        help="rollouts of each task for --diagnose (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--allow_code", default="", metavar="FILE.py", help="a file of yours with the rewards own:NAME"
    )
    add_processes(parser)
    args = parse(parser, argv)

    from mmada_jax.config import from_dict
    from mmada_jax.train.rl.diagnose import diagnose
    from mmada_jax.train.rl.loop import train
    from mmada_jax.train.rl.run import RLRun
    from mmada_jax.train.rl.unigrpo import MASKINGS

    program = "mmada rl --diagnose" if args.diagnose else "mmada rl"
    connect(args, program, functools.partial(from_dict, RLRun))
    if not args.diagnose:
        train(args.config, args.workdir, args.allow_code)
        return
    compared = args.maskings.split(",") if args.maskings else list(MASKINGS)
    diagnosed = diagnose(args.config, args.workdir, compared, args.batches, args.allow_code)
    for task, rows in diagnosed.items():
        print(f"{task}: {args.batches} rollouts")
        print(f"  {'masking':10} {'batch to batch':>15} {'to every reveal':>16} {'norm':>8}")
        for masking, found in rows.items():
            print(
                f"  {masking:10} {found['between_batches']:15.3f} {found['with_every']:16.3f} "
                f"{found['norm']:8.3g}"
            )
