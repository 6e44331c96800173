"""Compiles a step for a TPU topology, without one, and reports what the compiler says of it.

    mmada aot --config configs/pretrain.py:8b,phase=3 --topology v5p:4x4x4
    mmada aot --config configs/pretrain.py:8b,phase=3 --topology v5e:16x16 --slices 2 \
        --config.batch_size=1024 --config.model.remat=attention+middle --json
    mmada aot --config configs/pretrain.py:8b,phase=3 --step draw --topology v6e:1x1 \
        --config.batch_size=1
    mmada aot --config configs/pretrain.py:8b,phase=3 --step text_cached --topology v5e:2x2 \
        --config.batch_size=16
    mmada aot --config configs/unigrpo.py:8b --topology v5p:4x4x8
    mmada aot --config configs/pretrain.py:8b,phase=3 --topology h100:1x1 --config.lora.rank=16 \
        --config.batch_size=1            (the memory alone, and an upper bound)

A model of one's own has the sizes of its configuration and of its tokenizers, which must be there:
    mmada aot --config my_config.py: --workdir runs/mine --topology v5e:2x2

Needs no device, but libtpu: pip install -e ".[aot]". A compilation of the 8B takes some minutes. Exit
status 1 where the step doesn't fit. All figures are of one chip; the ceiling is an estimate of the
compiler, without collectives and Pallas kernels, and never a throughput.
"""

import json
import os
import sys

from mmada_jax import storage
from mmada_jax.programs.configured import config_parser, parse

WORKDIR = (
    "where the run will lie: the paths of its tokenizers and its start are relative to it; what isn't "
    "there yet is known of the published 8B models alone (default: runs/aot)"
)
STEPS = ("train", "draw", "text", "text_cached", "rollout", "score", "update")


def main(argv: list[str]) -> None:
    """Prints the report."""
    parser = config_parser(__doc__, "aot", WORKDIR, default="runs/aot")
    parser.add_argument("--topology", required=True, help="as v5p:4x4x4 or v5p-128; of one slice")
    parser.add_argument("--slices", type=int, default=1, metavar="N",
                        help="how many slices; the mesh axis data crosses them (default: 1)")  # fmt: skip
    parser.add_argument(
        "--step",
        choices=STEPS,
        help="training (the default), drawing with guidance, a step of decoding text, plain or with a "
        "cache; of UniGRPO one of the last three, by default all",
    )
    parser.add_argument(
        "--task", default="", help="of a UniGRPO config (default: the task with the longest rows)"
    )
    parser.add_argument("--program", metavar="FILE", help="write the compiled program there, as text (HLO)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parse(parser, argv)

    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: a TPU of this machine stays free
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is for a TPU can't be read back without one
    from mmada_jax.config import from_dict
    from mmada_jax.devices import chips
    from mmada_jax.train import aot
    from mmada_jax.train.rl.run import RLRun
    from mmada_jax.train.runs import ModelRun
    from mmada_jax.train.runs import parse as parse_run

    topology = chips.topology(args.topology, args.slices)
    is_rl = args.config.program == "rl"
    run = from_dict(RLRun, args.config) if is_rl else parse_run(args.config)
    if not isinstance(run, ModelRun | RLRun):
        raise ValueError("this configuration trains no model; use configs/pretrain.py:8b,phase=1")
    named = {"config": args.source, "overrides": args.overrides}
    steps = [args.step] if args.step else aot.RL if is_rl else ["train"]
    if args.program and len(steps) > 1:
        raise ValueError(f"--program is one file; name one of {', '.join(steps)} with --step")
    reports = []
    for step in steps:
        report = named | aot.report(
            run, topology, step, args.program, args.task, storage.path(args.workdir)
        )
        reports.append(report)
        if not args.json:
            print(as_text(report), flush=True)
        if not report["fits"]:
            print(what_to_change(report), file=sys.stderr)
    if args.json:
        print(json.dumps(reports[0] if len(reports) == 1 else reports, indent=2))
    if not all(report["fits"] for report in reports):
        sys.exit(1)


def as_text(report):
    """The report for people."""
    lines = [f"{report['step']} step of {report['config']}"]
    if report["overrides"]:
        lines.append("  " + " ".join(f"{name}={value}" for name, value in report["overrides"].items()))
    mesh = " ".join(f"{name} {size}" for name, size in report["mesh"].items())
    lines += [
        f"{report['topology']}, {report['chips']} chips ({mesh})",
        f"{report['rows_per_chip']:g} rows of {report['row_length']} tokens per chip, "
        f"{report['vocabulary']} logits for each, remat {report['remat']}",
        "",
        f"memory       {'fits' if report['fits'] else 'does not fit'}: peak "
        f"{report['hbm_peak_gib']:.2f} GiB of {report['hbm_limit_gib']:.2f}",
    ]
    if report["mfu_ceiling"] is not None:
        lines += [
            f"             arguments {report['hbm_arguments_gib']:.2f} GiB, temporaries "
            f"{report['hbm_temporaries_gib']:.2f}, all together {report['hbm_total_gib']:.2f}",
            f"attention    {report['attention_kernel']}",
            f"products     {report['matmul_flops'] / 1e12:.1f} TFLOP, "
            f"{report['matmul_flops'] / report['model_flops']:.2f} times the model's "
            f"{report['model_flops'] / 1e12:.1f}",
            f"ceiling      {report['mfu_ceiling']:.1%} of the peak, by the compiler's estimate of "
            f"{report['cycles'] / 1e6:.0f} M cycles,",
            "             collectives and Pallas kernels not counted; this is not a throughput",
        ]
        if report["roofline_ms"] is not None:
            lines.append(
                f"roofline     {report['roofline_ms']} ms: weights and cache read once, or the products "
                "computed, whichever is longer; not a measurement"
            )
        lines.append("collectives")
        lines += [
            f"  {kind:20} {c['count']:5}, {c['async']} asynchronous, {c['bytes'] / 1e9:.2f} GB"
            for kind, c in report["collectives"].items()
        ]
        lines.append(
            f"  blocking in one layer, forward and backward: {report['layer_loop_blocking_mb']} MB"
        )
    elif report["hbm_arguments_gib"] is not None:
        lines.append(
            f"             arguments {report['hbm_arguments_gib']:.2f} GiB, temporaries at most "
            f"{report['hbm_temporaries_gib']:.2f}, by the accounts of XLA for CPUs"
        )
    seconds, host = report["compile_seconds"], report["host_memory_gib"]
    lines.append(f"compiled in {seconds:.0f} s with {host:.1f} GiB of host memory")
    return "\n".join(lines)


def what_to_change(report):
    """One line for a step that needs more than there is."""
    needed, limit = report["hbm_peak_gib"], report["hbm_limit_gib"]
    text = f"does not fit: {needed:.2f} GiB needed, a chip has {limit:.2f}. "
    if report["step"] in ("rollout", "score", "update"):
        return text + "Use more chips, or lower the task's groups or --config.objective.responses."
    if report["step"] in ("draw", "text", "text_cached"):
        return text + "Use more chips (each holds a part of the weights), or lower --config.batch_size."
    ways, parts = [], report["accumulate"]
    rows, n_data = round(report["rows_per_chip"]), report["mesh"]["data"] * report["mesh"]["fsdp"]
    if rows > parts:
        fewer = max(1, rows // parts // 2) * parts * n_data
        ways.append(f"fewer rows per chip (--config.batch_size={fewer})")
        if rows % (2 * parts) == 0:
            ways.append(f"the batch in parts (--config.accumulate={2 * parts})")
    if report["remat"] != "full":
        less = {"none": "attention+middle+qkv+mlp", "attention+middle+qkv+mlp": "attention+middle+qkv"}
        remat = less.get(report["remat"], "full")
        ways.append(f"less kept for the backward pass (--config.model.remat={remat})")
    if report["mesh"]["tensor"] < 8:
        ways.append(f"a larger tensor axis (--config.mesh.tensor={2 * report['mesh']['tensor']})")
    return text + "Change: " + "; ".join([*ways, "more chips"])
