"""Compiles a step for TPUs that aren't there, and reports what the compiler says of it.

libtpu compiles for any topology on any machine. What it knows is exact where it decides (memory,
the collectives and their schedule, products) and an estimate where it guesses (cycles). Nothing here
is a measurement, and a ceiling on the utilisation is not a throughput.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import resource
import time
from typing import Any

import jax
import numpy as np

from mmada_jax import api, chips, denoise, hlo, layout, optim, sharding, train, transformer, vocab, vq
from mmada_jax.run import ModelRun, model_of
from mmada_jax.state import state_shardings

VOCAB = vocab.LLADA
GIB = 2**30


def devices(topology: chips.Topology) -> list[Any]:
    """Descriptions of the chips of a topology, to compile for. Needs libtpu (the extra `aot`)."""
    # The metadata server of a cloud machine isn't asked, and other processes may use libtpu too.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('libtpu is missing; pip install -e ".[aot]"')
    from jax.experimental import topologies

    shape = topology.shape + (1,) * (3 - len(topology.shape))
    options: dict[str, Any] = {
        # Without the links that close a ring, gathers turn into something slower.
        "wrap": tuple(size % topology.chip.wraps == 0 for size in shape),
        "num_slices": topology.slices,
    }
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = str(topology).split()[-1]
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def lower_train(run: ModelRun, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The training step of `run`, not yet compiled; the shape of the batch is all it needs of data."""
    model, L = model_of(run, VOCAB, _n_image(run)), _row_length(run)
    objective = train.model_objective(run, model, VOCAB.mask)
    optimizer = optim.make(run.optim, run.steps)
    train.check_rows(run, mesh)
    with jax.set_mesh(mesh):
        shapes, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
        step = train.make_step(objective, optimizer, mesh, shardings, run.accumulate)
        kinds = {"tokens": np.int32, "valid": bool, "target": bool, "shown": bool}
        batch = {name: jax.ShapeDtypeStruct((run.batch_size, L), kind) for name, kind in kinds.items()}
        task = jax.ShapeDtypeStruct((run.batch_size,), np.int32)
        return step.lower(shapes, _key(), layout.Batch(**batch, task=task))


def lower_draw(run: ModelRun, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Drawing `run.batch_size` images with guidance, not yet compiled: the loop over the steps."""
    n_image = _n_image(run)
    model = dataclasses.replace(model_of(run, VOCAB, n_image), remat="none")
    shapes = transformer.param_shapes(model)
    places = sharding.tree_shardings(mesh, transformer.param_axes(model), shapes)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=place), shapes, places
    )
    B, L = run.batch_size, _row_length(run)
    rows = jax.ShapeDtypeStruct((B, L), np.int32), jax.ShapeDtypeStruct((B, L), bool)
    with jax.set_mesh(mesh):
        return api.decoder(mesh).lower(
            params, *rows, _key(), rows, config=model, vocab=VOCAB, start=run.max_text + 2,
            length=n_image, rule=denoise.ImageRule(),
        )  # fmt: skip


LOWER = {"train": lower_train, "draw": lower_draw}


def report(
    run: ModelRun, topology: chips.Topology, step: str = "train", program_file: str | None = None
) -> dict[str, Any]:
    """Compiles and reports; all figures are per chip, and for "draw" those of one of its steps.
    "mfu_ceiling" is None where it doesn't fit. The program, as text, goes into `program_file`.

    hbm_*_gib        arguments, temporaries, the peak that the compiler plans, all of them together
    matmul_flops     of matrix products, kernels included
    model_flops      of the model's forward and backward pass, nothing recomputed
    mfu_ceiling      model_flops / (peak * cycles / clock): the compiler's estimate of cycles, which
                     knows neither collectives nor kernels. Not a throughput.
    collectives      kind -> count, those of them that are asynchronous, bytes
    layer_loop_blocking_mb   of collectives that nothing hides, forward and backward of one layer
    """
    sizes, model = dataclasses.asdict(run.mesh), model_of(run, VOCAB, _n_image(run))
    if step == "draw":  # no rows to spread: every chip has a part of each weight
        sizes = {"data": 1, "fsdp": 1, "tensor": -1}
        if model.n_kv_heads % topology.chips:
            raise ValueError(
                f"drawing gives every chip its own heads: {model.n_kv_heads} can't be split over the "
                f"{topology.chips} chips of {topology}; choose a smaller topology"
            )
    mesh = sharding.make_mesh(**sizes, devices=devices(topology))
    chip, n_data = topology.chip, mesh.shape["data"] * mesh.shape["fsdp"]
    L, rows = _row_length(run), run.batch_size / n_data
    out = {
        "step": step,
        "topology": str(topology),
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "rows_per_chip": rows,
        "row_length": L,
        "accumulate": run.accumulate,
        "remat": model.remat if step == "train" else "none",
        "hbm_limit_gib": chip.hbm_gib,
    }
    start = time.perf_counter()
    lowered = LOWER[step](run, mesh)
    compiled = _compile(lowered)
    out["compile_seconds"] = round(time.perf_counter() - start, 1)
    out["host_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if isinstance(compiled, float):
        return out | {"fits": False, "hbm_peak_gib": compiled, "hbm_total_gib": compiled, **NOT_COMPILED}

    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    positions = round(rows * L) // run.accumulate
    chunks = -(-positions // (run.loss_chunk or positions)) if step == "train" else 1
    text = compiled.as_text()
    if program_file:
        pathlib.Path(program_file).write_text(text)
    program = hlo.Program(text, trips=chunks)
    flops = model_flops(model, run, step) // topology.chips
    cycles = program.cycles()
    return out | {
        "fits": memory.peak_memory_in_bytes <= chip.hbm_gib * GIB,
        "hbm_arguments_gib": round(arguments / GIB, 2),
        "hbm_temporaries_gib": round(temporaries / GIB, 2),
        "hbm_peak_gib": round(memory.peak_memory_in_bytes / GIB, 2),
        "hbm_total_gib": round(total / GIB, 2),
        "matmul_flops": program.matmul_flops() + program.kernel_flops(),
        "model_flops": flops,
        "cycles": cycles,
        "mfu_ceiling": round(flops / (chip.tflops * 1e12 * cycles / (chip.ghz * 1e9)), 3),
        "collectives": _collectives(program),
        "layer_loop_blocking_mb": round(
            _blocking_mb(program, model.n_layers // model.unroll) / model.unroll, 1
        ),
        "attention_kernel": " ".join(program.kernels()) or "none: XLA's products",
    }


# What isn't known of a program that the compiler refused.
NOT_COMPILED = dict.fromkeys((
    "hbm_arguments_gib", "hbm_temporaries_gib", "matmul_flops", "model_flops", "cycles", "mfu_ceiling",
    "collectives", "layer_loop_blocking_mb", "attention_kernel",
))  # fmt: skip


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled | float:
    """The program, or the GiB that it would need where it is refused for them."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([GM])\)\s+exceeds\s+available\s+HBM", str(error))
        if not needed:
            raise
        return float(needed[1]) / (1 if needed[2] == "G" else 1024)


def model_flops(model: transformer.Config, run: ModelRun, step: str) -> int:
    """Two operations per multiply-add that the model asks for, on all chips: three passes in training
    (forward, and both gradients of each product), one in drawing, of two rows per image."""
    L, n_image = _row_length(run), _n_image(run)
    blocks = sum(
        x.size
        for name, x in transformer.param_shapes(model)["blocks"].items()
        if not name.endswith("norm_D")
    )
    per_position = 2 * blocks + 4 * L * model.d_model * model.n_layers
    if step == "draw":
        head = 2 * model.d_model * VOCAB.codebook_size * n_image
        return 2 * run.batch_size * (per_position * L + head)
    return 3 * run.batch_size * L * (per_position + 2 * model.d_model * model.vocab)


def _collectives(program: hlo.Program) -> dict[str, dict[str, int]]:
    """Kind -> how many run, how many of these are asynchronous, and their bytes."""
    out: dict[str, dict[str, int]] = {}
    for c in program.collectives():
        sums = out.setdefault(c.kind, {"count": 0, "async": 0, "bytes": 0})
        sums["count"] += c.times
        sums["async"] += c.times * c.is_async
        sums["bytes"] += c.times * c.bytes
    return out


def _blocking_mb(program: hlo.Program, trips: int) -> float:
    """Megabytes of the collectives that block in one round of the loops over the layers: those that run
    so often, have no other loop within, and have the attention if that is a kernel."""
    kernels = program.kernels()
    loops = {
        body
        for body, n in program.loops().items()
        if n == trips
        and not any(i.opcode == "while" for i in program.computations[body].values())
        and (not kernels or kernels.keys() & program.kernels(body).keys())
    }
    blocking = [c for c in program.collectives() if c.loop in loops and not c.is_async]
    return sum(c.bytes for c in blocking) / 1e6


def _n_image(run: ModelRun) -> int:
    if not run.image_size:
        raise ValueError(
            "config.image_size is 0, so the length of a row isn't known: this is for the 8B "
            "configurations, as configs/pretrain.py:8b"
        )
    side, rest = divmod(run.image_size, vq.PRESETS["magvitv2"].downsampling)
    if rest:
        raise ValueError(f"config.image_size is {run.image_size}; it must be a multiple of 16")
    return side**2


def _row_length(run: ModelRun) -> int:
    return run.max_text + _n_image(run) + 3


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))
