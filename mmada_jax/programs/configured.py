"""Options of the programs that a configuration describes: --config and what changes it; other processes."""

import argparse
from collections.abc import Callable
from typing import Any

from mmada_jax import storage
from mmada_jax.programs.process import Parser

EPILOG = "--config.KEY=VALUE sets any key of the configuration, as --config.optim.lr=1e-3."


def config_parser(doc: str, program: str, workdir: str, default: str | None = None) -> Parser:
    """A parser with --config and --workdir, about which `workdir` says what it is for."""
    parser = Parser(doc, prog=f"mmada {program}", epilog=EPILOG)
    parser.add_argument("--config", required=True, metavar="FILE:ARG", help="as configs/pretrain.py:digits")
    parser.add_argument("--workdir", required=default is None, default=default, metavar="DIR", help=workdir)
    return parser


def parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The options; `config` is the ConfigDict with its overrides, `source` its FILE:ARG, `overrides` the
    texts of --config.KEY=TEXT by their keys. Raises ValueError for what is wrong with them."""
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    from mmada_jax.config import load_config, split_overrides

    rest, overrides = split_overrides(argv)
    if overrides and not any(word.split("=")[0] == "--config" for word in rest):
        raise ValueError(f"--config.{next(iter(overrides))} changes a configuration; name it by --config")
    args = parser.parse_args(rest)
    args.source, args.overrides = args.config, overrides
    args.config = load_config(args.source, overrides)
    return args


def add_processes(parser: Parser) -> None:
    """Adds the options by which the processes of one run find each other."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, the same for all")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process_id", type=int, metavar="N", help="which of them this is, from 0")
    group.add_argument(
        "--distributed", action=argparse.BooleanOptionalAction,
        help="this is one of several processes that jax detects; default: if the environment of Slurm or "
        "TPUs says so",
    )  # fmt: skip
    group.add_argument(
        "--connect_timeout", type=int, default=300, metavar="SECONDS",
        help="to wait for the other processes (default: %(default)s)",
    )  # fmt: skip


def connect(args: argparse.Namespace, program: str, parse: Callable[[Any], Any]) -> None:
    """Starts jax and meets the other processes of the run. All must run the same program with the same
    configuration, which `parse` makes whole."""
    import jax

    from mmada_jax.config import to_dict
    from mmada_jax.devices.distributed import initialize_distributed, together
    from mmada_jax.programs.process import quiet, start_jax

    def meet():
        initialize_distributed(
            args.coordinator, args.num_processes, args.process_id, args.distributed, args.connect_timeout
        )
        with together(program, args.connect_timeout) as same:
            same |= {
                "config": to_dict(parse(args.config)),
                "workdir": str(storage.path(args.workdir).absolute()),
            }
        # The devices of all processes are asked for when all are sure to do so.
        with together(program, args.connect_timeout) as same:
            same |= {"devices": jax.local_device_count(), "kind of device": jax.devices()[0].device_kind}

    quiet()
    start_jax(meet)
