"""Compiles a step for TPUs that aren't there, and reports what the compiler says of it.

libtpu compiles for any topology on any machine. For a GPU only the memory is reported, as XLA for CPUs
counts it, which is more than a GPU needs. What it knows is exact where it decides (memory,
the collectives and their schedule, products) and an estimate where it guesses (cycles). Nothing here
is a measurement, and a ceiling on the utilisation is not a throughput.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmada_jax import storage
from mmada_jax.devices import chips, hlo, sharding
from mmada_jax.diffusion import decode, rules
from mmada_jax.model import inputs
from mmada_jax.model.model import Model
from mmada_jax.nets import cache as caches
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import LLADA
from mmada_jax.train import optim, supervised
from mmada_jax.train.rl.resume import frozen_reference, state_shapes
from mmada_jax.train.rl.rollout import make_generate, response_span
from mmada_jax.train.rl.run import RLRun, Task
from mmada_jax.train.rl.start import check_rollout_rows
from mmada_jax.train.rl.update import (
    Chosen,
    UpdateBatch,
    base_shapes,
    make_objective,
    make_score,
    policy_of,
    policy_places,
)
from mmada_jax.train.runs import ModelRun, Plan, check_rows, foresee, held_base, relative
from mmada_jax.weights.folder import image_tokenizer_of, open_folder
from mmada_jax.weights.state import state_shardings

GIB = 2**30
WORKDIR = storage.path("runs/aot")  # where a run would lie, if nobody says


def devices(topology: chips.Topology) -> list[Any]:
    """Descriptions of the chips of a topology, to compile for. Needs libtpu (the extra `aot`), but for a
    GPU, in whose place stands the CPU."""
    if topology.chip.on_host:
        return jax.devices("cpu")[: topology.chips]
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


def lower_train(run: ModelRun, plan: Plan, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The training step of `run`, not yet compiled; the shape of the batch is all it needs of data."""
    L = plan.shape.length
    model = held_base(plan.model, run.base_dtype) if run.lora.rank else plan.model
    objective = supervised.model_objective(run, model, plan.vocab)
    optimizer = optim.make(run.optim, run.steps)
    check_rows(run, mesh)
    with jax.set_mesh(mesh):
        shapes, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
        base, places = _frozen(run, plan, mesh)
        step = supervised.make_step(objective, optimizer, mesh, shardings, run.accumulate, places)
        kinds = {"tokens": np.int32, "valid": bool, "target": bool, "shown": bool}
        batch = {name: jax.ShapeDtypeStruct((run.batch_size, L), kind) for name, kind in kinds.items()}
        task = jax.ShapeDtypeStruct((run.batch_size,), np.int32)
        return step.lower(shapes, _key(), layout.Batch(**batch, task=task), *base)


def _frozen(run: ModelRun, plan: Plan, mesh: jax.sharding.Mesh) -> tuple[list[Any], list[Any]]:
    """What a run with adapters doesn't train, as shapes, and its shardings; empty for other runs."""
    if not run.lora.rank:
        return [], []
    base = base_shapes(run, plan.model)
    return [base], [decode.param_shardings(mesh, held_base(plan.model, run.base_dtype))]


BLOCK = 32  # tokens of a block of text


def lower_text(run: ModelRun, plan: Plan, mesh: jax.sharding.Mesh, is_cached: bool) -> jax.stages.Lowered:
    """A step of decoding text in `run.batch_size` rows, not yet compiled: the ids of a block that are most
    likely. It computes whole rows, or the block with stored keys and values of the rest."""
    params, model = _bf16(plan, mesh)
    B, L = run.batch_size, plan.shape.length
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def ids(network, h_BND):
        return jax.numpy.argmax(network.unembed(h_BND), axis=-1)

    def plain(params, tokens_BL, valid_BL):
        network = transformer.Network(params, model)
        return ids(network, network.hidden_states(tokens_BL, valid_BL)[:, -BLOCK:])

    def of_block(params, tokens_BN, place_BN, valid_BN, cache, seen_BL):
        network = transformer.Network(params, model)
        return ids(network, network.hidden_block(tokens_BN, place_BN, valid_BN, cache, seen_BL)[0])

    places = jax.tree.map(lambda x: x.sharding, params)
    with jax.set_mesh(mesh):
        if not is_cached:
            step = sharding.jit(mesh, plain, (places, rows, rows), everywhere)
            given = [jax.ShapeDtypeStruct((B, L), kind) for kind in (np.int32, bool)]
            return step.lower(params, *given)
        of_cache = caches.shardings(mesh)
        in_shardings = (places, rows, rows, rows, of_cache, rows)
        step = sharding.jit(mesh, of_block, in_shardings, everywhere)
        given = [jax.ShapeDtypeStruct((B, BLOCK), kind) for kind in (np.int32, np.int32, bool)]
        cache = jax.eval_shape(lambda: transformer.Network(None, model).empty_cache(B, L))
        return step.lower(params, *given, cache, jax.ShapeDtypeStruct((B, L), bool))


def _bf16(plan: Plan, mesh: jax.sharding.Mesh) -> tuple[Any, transformer.ModelConfig]:
    """The params of a model that decodes, as shapes on the mesh, and its architecture."""
    model = dataclasses.replace(plan.model, remat="none")
    shapes, places = transformer.held_shapes(model), decode.param_shardings(mesh, model)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    ), model


def lower_draw(run: ModelRun, plan: Plan, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Drawing `run.batch_size` images with guidance, not yet compiled: the loop over the steps."""
    params, model = _bf16(plan, mesh)
    B, L = run.batch_size, plan.shape.length
    rows = jax.ShapeDtypeStruct((B, L), np.int32), jax.ShapeDtypeStruct((B, L), bool)
    with jax.set_mesh(mesh):
        draw = decode.decoder(mesh, model, plan.vocab, plan.shape.n_image, rules.ImageRule())
        of_rows = [jax.ShapeDtypeStruct((B,), kind) for kind in (np.int32, np.int32, np.uint32, np.int32)]
        return draw.lower(params, decode.Placed(*rows, *of_rows, rows))


def lower_rl(
    run: RLRun, model: Model, step: str, task: Task, mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    """One of the three functions of reinforcement learning for a task, not yet compiled."""
    model = dataclasses.replace(model, mesh=mesh)
    at = response_span(task, model.vocab, model.rows)
    optimizer = optim.make(run.optim, run.iterations * run.objective.mu)
    check_rollout_rows(run, mesh)
    with jax.set_mesh(mesh):
        shapes, shardings = state_shapes(run, model, optimizer, mesh)
        R, S = (n * run.objective.responses for n in (task.groups, task.kept))
        rows = [jax.ShapeDtypeStruct((R, at.row), kind) for kind in (np.int32, bool)]
        responses = run.objective.responses
        places, frozen = policy_places(run, model, mesh, shardings.params)
        base = base_shapes(run, model.config)
        policy = jax.eval_shape(functools.partial(policy_of, run), shapes.params, base)
        generate = make_generate(mesh, model.config, model.vocab, at, places, responses)
        guided = at.rule.guidance and task.layout == "t2i"
        given = policy, *rows, _key(), rows if guided else None
        if step == "rollout":
            return generate.lower(*given)
        rollout = jax.eval_shape(generate, *given)
        reference = jax.eval_shape(functools.partial(frozen_reference, run=run), shapes.params)
        if run.lora.rank and run.objective.kl == "reference":
            reference = base
        score = make_score(run, model, at, mesh, places)
        scored = policy, reference, rollout, _key(), 0
        if step == "score":
            return score.lower(*scored)
        objective = make_objective(run, model, at)
        update = supervised.make_step(objective, optimizer, mesh, shardings, run.accumulate, frozen)
        kinds = (np.int32, np.float32, np.float32, bool)
        *chosen, fresh_S = (jax.ShapeDtypeStruct((S,), kind) for kind in kinds)
        batch = UpdateBatch(jax.eval_shape(score, *scored), *rows, Chosen(*chosen), fresh_S)
        return update.lower(shapes, _key(), batch, *([base] if frozen else []))


def rl_model(run: RLRun, workdir: storage.Path) -> Model:
    """The model that a run would load, without its image codec, on no mesh. Where there is no `init` yet,
    the published 8B model is meant, which draws 512 x 512 pixels, unless tasks are about digits."""
    init = relative(run.init, workdir)
    if not init.exists() and any(task.data.format == "digits" for task in run.tasks.values()):
        raise FileNotFoundError(
            f"config.init: there is no {init}; train it first (--workdir says where this run lies), or "
            "use unigrpo.py:8b, whose sizes are known"
        )
    if not init.exists():
        config = dataclasses.replace(transformer.PRESETS["llada-8b"], vocab=LLADA.rows, **run.model)
        return Model(config, LLADA, None, None, None, 512, (32, 32), None)
    source = open_folder(init)
    nested = relative(run.image_tokenizer, workdir) if run.image_tokenizer else None
    images, texts = image_tokenizer_of(source, nested), source.tokenizer()
    if images is None or texts is None:
        raise FileNotFoundError(f"config.init: {init} needs a tokenizer.json and an image tokenizer")
    vocab = texts.vocab(images.config.codebook_size, source.config.vocab)
    grid = inputs.image_grid(source.values, images.config.downsampling)
    max_text = inputs.text_length(source.values)
    config = dataclasses.replace(source.config, **({"dtype": "float32"} | dict(run.model)))
    return Model(config, vocab, texts, None, images.config, max_text, grid, None)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A step to compile, and what its report needs to know. `passes` counts the passes over all rows, in
    forward passes of the model; `logits` counts the logits of one such pass."""

    lower: Callable[[jax.sharding.Mesh], jax.stages.Lowered]
    model: transformer.ModelConfig
    mesh: dict[str, int]
    rows: int
    length: int
    passes: int = 1
    logits: int | None = None
    accumulate: int = 1
    chunk: int | None = None  # positions of a device that have logits at a time
    copies: int = 1  # two where guidance runs a second row beside each
    shared: int = 1  # rows that share the pass before the loop, where one device has all rows

    def flops(self, row_parts: int) -> int:
        """Of the model's passes, where the rows lie in `row_parts` parts on the devices."""
        passes = self.passes if row_parts > 1 else self.passes - 1 + 1 / self.shared
        return round(passes * transformer.forward_flops(self.model, self.rows, self.length, self.logits))


TRAINING, RL = ("train", "draw", "text", "text_cached"), ("rollout", "score", "update")


def subject(run: ModelRun | RLRun, step: str, task: str = "", workdir: storage.Path = WORKDIR) -> Subject:
    """A step of a run: of TRAINING for a model, of RL for one of its tasks, by default that with the
    longest rows. Raises ValueError for a step that the run doesn't have."""
    known = RL if isinstance(run, RLRun) else TRAINING
    if step not in known:
        raise ValueError(f"this configuration has no step {step!r}; known: {', '.join(known)}")
    mesh = dataclasses.asdict(run.mesh)
    if isinstance(run, RLRun):
        model = rl_model(run, workdir)
        spans = {n: response_span(t, model.vocab, model.rows) for n, t in sorted(run.tasks.items())}
        task = task or max(spans, key=lambda name: spans[name].row)
        if task not in spans:
            raise ValueError(f"there is no task {task!r}; known: {', '.join(spans)}")
        of, at = run.tasks[task], spans[task]
        lower = functools.partial(lower_rl, run, model, step, of)
        rows = run.objective.responses * (of.kept if step == "update" else of.groups)
        n_ids = at.rule.vocabulary(model.vocab)[1] or model.vocab.rows
        if step == "rollout":
            guided = 2 if at.rule.guidance else 1
            block = at.rule.size(at.length)
            logits = guided * rows * block * n_ids
            # How many steps there are is seen when it runs: the compiler counts the loop once. With a cache
            # that is a first pass and a short step, and a first pass over all rows comes before the loop.
            cached = at.rule.cache != "none"
            return Subject(
                lower, model.config, mesh, guided * rows, at.row, 1 + cached, logits, copies=guided,
                shared=run.objective.responses if cached else 1,
            )  # fmt: skip
        passes = 3 if step == "update" else 1 + (run.objective.kl == "reference")
        parts = run.accumulate if step == "update" else 1
        logits = rows * at.length * n_ids
        return Subject(lower, model.config, mesh, rows, at.row, passes, logits, parts, run.loss_chunk)
    plan = foresee(run, workdir)
    B, L, model = run.batch_size, plan.shape.length, plan.model
    if step == "train":
        lower = functools.partial(lower_train, run, plan)
        return Subject(lower, model, mesh, B, L, 3, None, run.accumulate, run.loss_chunk)
    # No rows to spread: every chip has a part of each weight. Every image has a second row.
    model = dataclasses.replace(model, remat="none")
    mesh = {"data": 1, "fsdp": 1, "tensor": -1}
    if step in ("text", "text_cached"):
        is_cached = step == "text_cached"
        lower = functools.partial(lower_text, run, plan, is_cached=is_cached)
        return Subject(lower, model, mesh, B, BLOCK if is_cached else L, 1, B * BLOCK * model.vocab)
    logits = 2 * B * plan.shape.n_image * plan.vocab.codebook_size
    return Subject(functools.partial(lower_draw, run, plan), model, mesh, 2 * B, L, 1, logits, copies=2)


def report(
    run: ModelRun | RLRun,
    topology: chips.Topology,
    step: str = "train",
    program_file: str | None = None,
    task: str = "",
    workdir: storage.Path = WORKDIR,
) -> dict[str, Any]:
    """Compiles and reports, the program's text into `program_file`. All figures are per chip; "draw" and
    "rollout" count one step of the loop, with a cache the first pass before it too.

    hbm_*_gib        arguments, temporaries, the peak that the compiler plans, all of them together
    matmul_flops     of matrix products, kernels included
    model_flops      of the model's forward and backward pass, nothing recomputed
    mfu_ceiling      model_flops / (peak * cycles / clock): the compiler's estimate of cycles, which
                     knows neither collectives nor kernels. Not a throughput. None if it doesn't fit.
    roofline_ms      the least time that a step of text takes: to read what it is given once, weights and
                     cache, or to compute the products, whichever is longer. Not a measurement.
    collectives      kind -> count, how many of them are asynchronous, bytes
    layer_loop_blocking_mb   of collectives that nothing hides, forward and backward of one layer
    """
    what = subject(run, step, task, workdir)
    model = what.model
    if step in ("draw", "text", "text_cached") and model.n_kv_heads % topology.chips:
        raise ValueError(
            f"decoding gives every chip its own heads: {model.n_kv_heads} can't be split over the "
            f"{topology.chips} chips of {topology}; choose a smaller topology"
        )
    mesh = sharding.make_mesh(**what.mesh, devices=devices(topology))
    chip, n_data = topology.chip, sharding.row_parts(mesh)
    rows = what.rows / n_data
    out = {
        "step": step,
        "topology": str(topology),
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "rows_per_chip": rows / what.copies,
        "row_length": what.length,
        "vocabulary": model.vocab,
        "accumulate": what.accumulate,
        "remat": model.remat if step in ("train", "update") else "none",
        "hbm_limit_gib": chip.hbm_gib,
    }
    start = time.perf_counter()
    lowered = what.lower(mesh)
    compiled = _compile(lowered)
    out["compile_seconds"] = round(time.perf_counter() - start, 1)
    out["host_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if isinstance(compiled, float):
        return out | {"fits": False, "hbm_peak_gib": compiled, "hbm_total_gib": compiled, **NOT_COMPILED}

    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
    positions = round(rows * what.length) // what.accumulate
    chunks = -(-positions // (what.chunk or positions))
    text = compiled.as_text()
    if topology.chip.on_host:
        return out | NOT_COMPILED | _on_host(arguments, temporaries, total, chip)
    if program_file:
        storage.path(program_file).write_text(text)
    program = hlo.CompiledProgram(text, trips=chunks)
    flops = what.flops(n_data) // topology.chips
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
        "roofline_ms": _roofline_ms(chip, arguments, program) if step.startswith("text") else None,
        "collectives": _collectives(program),
        "layer_loop_blocking_mb": _blocking_mb(program, model),
        "attention_kernel": " ".join(program.kernels()) or "none: XLA's products",
    }


def _on_host(arguments: int, temporaries: int, total: int, chip: chips.Chip) -> dict[str, Any]:
    """The memory by XLA for CPUs, which computes products of bfloat16 in float32: a GPU needs less."""
    gib = {"arguments": arguments, "temporaries": temporaries, "peak": total, "total": total}
    sizes = {f"hbm_{name}_gib": round(size / GIB, 2) for name, size in gib.items()}
    return sizes | {"fits": total <= chip.hbm_gib * GIB}


def _roofline_ms(chip: chips.Chip, bytes_read: int, program: hlo.CompiledProgram) -> float:
    flops = program.matmul_flops() + program.kernel_flops()
    return round(1e3 * max(bytes_read / (chip.hbm_gbps * 1e9), flops / (chip.tflops * 1e12)), 2)


# What isn't known of a program that the compiler refused.
NOT_COMPILED = dict.fromkeys((
    "hbm_arguments_gib", "hbm_temporaries_gib", "matmul_flops", "model_flops", "cycles", "mfu_ceiling",
    "roofline_ms", "collectives", "layer_loop_blocking_mb", "attention_kernel",
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


def _collectives(program: hlo.CompiledProgram) -> dict[str, dict[str, int]]:
    """Kind -> how many run, how many of these are asynchronous, and their bytes."""
    out: dict[str, dict[str, int]] = {}
    for c in program.collectives():
        sums = out.setdefault(c.kind, {"count": 0, "async": 0, "bytes": 0})
        sums["count"] += c.times
        sums["async"] += c.times * c.is_async
        sums["bytes"] += c.times * c.bytes
    return out


def _blocking_mb(program: hlo.CompiledProgram, model: transformer.ModelConfig) -> float:
    """Megabytes of the collectives that block in one layer, in the loops over the layers: those that run so
    often, have no other loop within, and have the attention if that is a kernel."""
    trips = model.n_layers // model.unroll
    kernels = program.kernels()
    loops = {
        body
        for body, n in program.loops().items()
        if n == trips
        and not any(i.opcode == "while" for i in program.computations[body].values())
        and (not kernels or kernels.keys() & program.kernels(body).keys())
    }
    blocking = [c for c in program.collectives() if c.loop in loops and not c.is_async]
    return round(sum(c.bytes for c in blocking) / 1e6 / model.unroll, 1)


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))
