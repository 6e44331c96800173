"""Training: one program for the image tokenizer and for stages 1 and 2 of the model.

A program is what differs between them: how params are made and laid out, the batch of a step, the
loss. The loop below is the same for both. Batches are functions of (seed, step) and the key of a
step is fold_in(root, step), so a resumed run repeats to the bit what an uninterrupted one does.
"""

import contextlib
import dataclasses
import functools
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mmada_jax import config as config_lib
from mmada_jax import corrupt, layout, loss, optim, sharding, transformer, vq
from mmada_jax.checkpoint import Checkpoints, check_workdir, claim_workdir
from mmada_jax.data import digits
from mmada_jax.data.pipeline import DigitCanvases, DigitRows, rows_per_task
from mmada_jax.data.tokenizer import TextTokenizer
from mmada_jax.metrics import Metrics
from mmada_jax.run import ModelRun, VQRun, image_tokenizer_of, load_vq, parse, plan, preset_of
from mmada_jax.state import TrainState, init_state, state_shardings


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained: params, and their loss on rows that `prepare` has made of a batch.

    Where a batch is taken in parts, `loss` must be a sum over rows: their gradients are added.
    """

    init_params: Callable[[jax.Array], Any]
    axes: Any  # logical axis names of the params, None: replicated
    prepare: Callable[[jax.Array, Any], Any]  # (key of the step, batch) -> rows
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]  # (params, rows)


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop needs to know of a run."""

    objective: Objective
    batch: Callable[[int], Any]
    tokens_per_step: int
    tokenizer: TextTokenizer | None = None
    accumulate: int = 1


# Groups of the configuration that make a model what it is: a workdir holds one model.
FIXED = ("program", "preset", "model", "text_vocab", "max_text")
# How it is computed may change.
FREE = ("model.attention", "model.dtype", "model.remat", "model.unroll")


def train(config: Mapping[str, Any], workdir: str | pathlib.Path) -> TrainState:
    """Trains until `config.steps`, from the newest checkpoint of the workdir if there is one.

    Raises ValueError for a configuration that doesn't fit, itself or the workdir, before any
    compute. SIGTERM saves and returns: `state.step` is then less than `config.steps`. Where there are
    several processes, all call this; the first one writes and prints.
    """
    # ---- Configuration --------------------------------------------------------------------------
    run, mesh = check(config, workdir)
    workdir, first_process = pathlib.Path(workdir), jax.process_index() == 0
    say = functools.partial(print, flush=True) if first_process else lambda *_: None
    program = model_program(run, workdir) if isinstance(run, ModelRun) else vq_program(run)
    claim_workdir(workdir, config_lib.to_dict(run))
    if program.tokenizer and first_process:
        program.tokenizer.save(workdir / "tokenizer.json")

    # ---- State ----------------------------------------------------------------------------------
    optimizer = optim.make(run.optim, run.steps)
    objective = program.objective
    shapes, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
    n_params = sum(x.size for x in jax.tree.leaves(shapes.params))
    root = jax.random.key(run.seed)
    with (
        _watch_sigterm(mesh) as sigterm,  # until the last save is complete
        Checkpoints(workdir, run.keep) as checkpoints,
        jax.set_mesh(mesh),
    ):
        latest = checkpoints.latest()
        if latest is None:
            state = init_state(jax.random.fold_in(root, 0), objective.init_params, optimizer, shardings)
        else:
            state = checkpoints.restore(shapes, shardings)
        first = latest or 0
        if first >= run.steps:
            say(f"{workdir}: {first} steps are done already")
            return state
        say(
            f"{workdir}: {n_params:,} parameters, mesh {dict(mesh.shape)}, "
            + (f"resuming at step {first}" if first else "from scratch")
        )

        # ---- Loop -------------------------------------------------------------------------------
        step_fn = make_step(objective, optimizer, mesh, shardings, program.accumulate)
        with ThreadPoolExecutor(1) as ahead, Metrics(workdir, run.steps, first) as metrics:
            upcoming = ahead.submit(program.batch, first)
            for step in range(first, run.steps):
                batch = sharding.put_batch(mesh, upcoming.result())
                if step + 1 < run.steps:
                    upcoming = ahead.submit(program.batch, step + 1)
                stop = sigterm()
                state, values = step_fn(state, root, batch)
                done = step + 1
                if step == first:
                    jax.block_until_ready(values)
                    metrics.resume_clock()
                if done % run.log_every == 0 or done == run.steps:
                    values = {name: float(value) for name, value in values.items()}
                    metrics.write(done, values, program.tokens_per_step)
                    optim.check_finite(state.opt_state)
                stop = bool(stop)
                if done % run.save_every == 0 or done == run.steps or stop:
                    checkpoints.save(state)
                if stop:
                    say(f"stopped by SIGTERM after step {done}; run again to resume")
                    break
    return state


def check(
    config: Mapping[str, Any], workdir: str | pathlib.Path, vq_config: Mapping[str, Any] | None = None
) -> tuple[VQRun | ModelRun, jax.sharding.Mesh]:
    """Raises for whatever is wrong with a configuration, before anything is computed or written.

    `vq_config` is that of the image tokenizer, where a model's is yet to be trained.
    """
    run, workdir = parse(config), pathlib.Path(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    check_rows(run, mesh)
    check_workdir(workdir, config_lib.to_dict(run), FIXED, FREE)
    if isinstance(run, ModelRun):
        to_train = vq_config and preset_of(vq.PRESETS, parse(vq_config).preset)
        plan(run, workdir, to_train)
    else:
        preset_of(vq.PRESETS, run.preset)
    return run, mesh


def check_rows(run: VQRun | ModelRun, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the rows of a batch can't be spread over the devices."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = run.accumulate if isinstance(run, ModelRun) else 1
    if run.batch_size % (shards * parts):
        accumulated = f" times the {parts} parts of `accumulate`" if parts > 1 else ""
        fits = -(-run.batch_size // (shards * parts)) * shards * parts
        raise ValueError(
            f"batch_size {run.batch_size} is not divisible by the {shards} data shards{accumulated} of "
            f"mesh {dict(mesh.shape)}; the next that is: {fits}"
        )


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    accumulate: int = 1,
) -> Callable[[TrainState, jax.Array, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, root key, batch) -> (state, metrics); the old state is donated.

    With `accumulate` the rows go through the model in that many parts, one after the other.
    """

    def gradients(params, rows):
        (total, values), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, rows)
        return jax.lax.with_sharding_constraint(grads, shardings.params), {"loss": total, **values}

    def step_fn(state, root, batch):
        key = jax.random.fold_in(jax.random.fold_in(root, 1), state.step)
        rows = objective.prepare(key, batch)
        if accumulate == 1:
            grads, values = gradients(state.params, rows)
        else:
            # Row i goes into part i % accumulate: every device keeps its own rows.
            parts = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), rows
            )
            zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, state.params, rows))
            add = functools.partial(jax.tree.map, jnp.add)
            (grads, values), _ = jax.lax.scan(
                lambda sums, part: (add(sums, gradients(state.params, part)), None), zero, parts
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        values |= {"grad_norm": optax.tree.norm(grads), "skipped": optim.skipped(opt_state)}
        return TrainState(state.step + 1, params, opt_state), values

    everywhere = sharding.replicated(mesh)
    return jax.jit(
        step_fn,
        in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=sharding.compiler_options(mesh),
    )


class Rows(NamedTuple):
    """Corrupted rows with what the loss needs beside them."""

    seen: corrupt.Corrupted
    valid_BL: jax.Array
    task_B: jax.Array


def model_objective(run: ModelRun, model: transformer.Config, mask: int) -> Objective:
    """The model on token rows: corrupt, hidden states, weighted loss."""
    tasks = [task for task, share in run.mixture.items() if share]

    def prepare(key, batch):
        return Rows(corrupt.corrupt(key, batch, mask, run.loss), batch.valid, batch.task)

    def loss_fn(params, rows):
        seen = rows.seen
        h_BLD = transformer.hidden_states(params, model, seen.tokens_BL, rows.valid_BL)
        total, each_B = loss.weighted_nll(
            h_BLD, params["head_DV"], seen.targets_BL, seen.weights_BL, run.loss_chunk
        )
        by_task = {
            f"loss_{task}": jnp.sum(jnp.where(rows.task_B == layout.TASKS.index(task), each_B, 0))
            for task in tasks
        }
        return total, by_task

    return Objective(
        functools.partial(transformer.init_params, config=model),
        transformer.param_axes(model),
        prepare,
        loss_fn,
    )


def model_program(run: ModelRun, workdir: pathlib.Path) -> Program:
    """The model on handwritten digits."""
    what = plan(run, workdir)
    vq_params, vq_config = load_vq(image_tokenizer_of(run, workdir))
    batch = DigitRows(
        what.tokenizer,
        what.vocab,
        jax.jit(functools.partial(vq.encode, vq_params, vq_config)),
        rows_per_task(run.mixture, run.batch_size),
        run.max_text,
        what.n_image,
        run.cond_dropout,
        run.seed,
    )
    return Program(
        objective=model_objective(run, what.model, what.vocab.mask),
        batch=batch,
        tokens_per_step=run.batch_size * batch.length,
        tokenizer=what.tokenizer,
        accumulate=run.accumulate,
    )


def vq_program(run: VQRun) -> Program:
    """The image tokenizer on pixels."""
    vq_config = preset_of(vq.PRESETS, run.preset)

    def loss_fn(params, pixels_BIJC):
        terms = vq.losses(params, vq_config, pixels_BIJC)
        total = (
            terms["reconstruction"] + run.entropy * terms["entropy"] + run.commitment * terms["commitment"]
        )
        return total, terms

    return Program(
        objective=Objective(
            init_params=functools.partial(vq.init_params, config=vq_config),
            axes=None,
            prepare=lambda key, pixels_BIJC: pixels_BIJC,  # nothing is drawn
            loss=loss_fn,
        ),
        batch=DigitCanvases(run.batch_size, run.seed),
        tokens_per_step=run.batch_size * digits.HEIGHT * digits.WIDTH // vq_config.downsampling**2,
    )


@contextlib.contextmanager
def _watch_sigterm(mesh: jax.sharding.Mesh) -> Iterator[Callable[[], bool | jax.Array]]:
    """Gives a function whose answer is true once SIGTERM has arrived.

    Where there are several processes, all must call it at the same steps, and get the same answer: true
    if SIGTERM arrived at any. The answer is then an array, ready when the work queued before is done.
    """
    received: list[int] = []
    # Outside of the main thread the caller handles signals.
    in_main = threading.current_thread() is threading.main_thread()
    before = in_main and signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    anywhere = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))

    def ask():
        if jax.process_count() == 1:
            return bool(received)
        flags = jax.make_array_from_callback((mesh.size,), each, lambda _: np.array([bool(received)]))
        return anywhere(flags)

    try:
        yield ask
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
