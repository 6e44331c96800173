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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
class Program:
    """What the loop needs to know of a run."""

    init_params: Callable[[jax.Array], Any]
    axes: Any  # logical axis names of the params, None: replicated
    loss: Callable[[Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]
    batch: Callable[[int], Any]
    tokens_per_step: int
    tokenizer: TextTokenizer | None = None


# Groups of the configuration that make a model what it is: a workdir holds one model.
FIXED = ("program", "preset", "model", "text_vocab", "max_text")


def train(config: Mapping[str, Any], workdir: str | pathlib.Path) -> TrainState:
    """Trains until `config.steps`, from the newest checkpoint of the workdir if there is one.

    Raises ValueError for a configuration that doesn't fit, itself or the workdir, before any
    compute. SIGTERM saves and returns.
    """
    # ---- Configuration --------------------------------------------------------------------------
    run, mesh = check(config, workdir)
    workdir = pathlib.Path(workdir)
    program = model_program(run, workdir) if isinstance(run, ModelRun) else vq_program(run)
    claim_workdir(workdir, config_lib.to_dict(run))
    if program.tokenizer:
        program.tokenizer.save(workdir / "tokenizer.json")

    # ---- State ----------------------------------------------------------------------------------
    optimizer = optim.make(run.optim, run.steps)
    shapes, shardings = state_shardings(mesh, program.init_params, program.axes, optimizer)
    n_params = sum(x.size for x in jax.tree.leaves(shapes.params))
    root = jax.random.key(run.seed)
    with Checkpoints(workdir, run.keep) as checkpoints, jax.set_mesh(mesh):
        latest = checkpoints.latest()
        if latest is None:
            state = init_state(jax.random.fold_in(root, 0), program.init_params, optimizer, shardings)
        else:
            state = checkpoints.restore(shapes, shardings)
        first = latest or 0
        if first >= run.steps:
            print(f"{workdir}: {first} steps are done already", flush=True)
            return state
        print(
            f"{workdir}: {n_params:,} parameters, mesh {dict(mesh.shape)}, "
            + (f"resuming at step {first}" if first else "from scratch"),
            flush=True,
        )

        # ---- Loop -------------------------------------------------------------------------------
        step_fn = make_step(program, optimizer, mesh, shardings)
        stop = _stop_on_sigterm()
        with ThreadPoolExecutor(1) as ahead, Metrics(workdir, run.steps, first) as metrics:
            upcoming = ahead.submit(program.batch, first)
            for step in range(first, run.steps):
                batch = sharding.put_batch(mesh, upcoming.result())
                if step + 1 < run.steps:
                    upcoming = ahead.submit(program.batch, step + 1)
                state, values = step_fn(state, root, batch)
                done = step + 1
                if step == first:
                    jax.block_until_ready(values)
                    metrics.resume_clock()
                if done % run.log_every == 0 or done == run.steps:
                    values = {name: float(value) for name, value in values.items()}
                    metrics.write(done, values, program.tokens_per_step)
                    optim.check_finite(state.opt_state)
                if done % run.save_every == 0 or done == run.steps or stop:
                    checkpoints.save(state)
                if stop:
                    print(f"stopped by SIGTERM after step {done}; run again to resume", flush=True)
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
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.batch_size % shards:
        raise ValueError(
            f"batch_size {run.batch_size} is not divisible by the {shards} data shards: {mesh.shape}"
        )
    check_workdir(workdir, config_lib.to_dict(run), FIXED)
    if isinstance(run, ModelRun):
        to_train = vq_config and preset_of(vq.PRESETS, parse(vq_config).preset)
        plan(run, workdir, to_train)
    else:
        preset_of(vq.PRESETS, run.preset)
    return run, mesh


def make_step(
    program: Program,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
) -> Callable[[TrainState, jax.Array, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, root key, batch) -> (state, metrics); the old state is donated."""

    def step_fn(state, root, batch):
        key = jax.random.fold_in(jax.random.fold_in(root, 1), state.step)
        grad_fn = jax.value_and_grad(program.loss, has_aux=True)
        (total, values), grads = grad_fn(state.params, key, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        values = {
            "loss": total,
            **values,
            "grad_norm": optax.tree.norm(grads),
            "skipped": optim.skipped(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state), values

    everywhere = sharding.replicated(mesh)
    return jax.jit(
        step_fn,
        in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def model_program(run: ModelRun, workdir: pathlib.Path) -> Program:
    """The model on token rows: corrupt, hidden states, weighted loss."""
    what = plan(run, workdir)
    model, vocab = what.model, what.vocab
    vq_params, vq_config = load_vq(image_tokenizer_of(run, workdir))
    rows = rows_per_task(run.mixture, run.batch_size)
    batch = DigitRows(
        what.tokenizer,
        vocab,
        jax.jit(functools.partial(vq.encode, vq_params, vq_config)),
        rows,
        run.max_text,
        what.n_image,
        run.cond_dropout,
        run.seed,
    )

    def loss_fn(params, key, batch):
        seen = corrupt.corrupt(key, batch, vocab.mask, run.loss)
        h_BLD = transformer.hidden_states(params, model, seen.tokens_BL, batch.valid)
        unembed = functools.partial(transformer.unembed, params, model)
        each_B = loss.weighted_nll(unembed, h_BLD, seen.targets_BL, seen.weights_BL, run.loss_chunk)
        by_task = {
            f"loss_{task}": jnp.sum(jnp.where(batch.task == layout.TASKS.index(task), each_B, 0))
            for task in rows
        }
        return jnp.sum(each_B), by_task

    return Program(
        init_params=functools.partial(transformer.init_params, config=model),
        axes=transformer.param_axes(model),
        loss=loss_fn,
        batch=batch,
        tokens_per_step=run.batch_size * batch.length,
        tokenizer=what.tokenizer,
    )


def vq_program(run: VQRun) -> Program:
    """The image tokenizer on pixels."""
    vq_config = preset_of(vq.PRESETS, run.preset)

    def loss_fn(params, key, pixels_BIJC):
        del key  # nothing is drawn
        terms = vq.losses(params, vq_config, pixels_BIJC)
        total = (
            terms["reconstruction"] + run.entropy * terms["entropy"] + run.commitment * terms["commitment"]
        )
        return total, terms

    return Program(
        init_params=functools.partial(vq.init_params, config=vq_config),
        axes=None,
        loss=loss_fn,
        batch=DigitCanvases(run.batch_size, run.seed),
        tokens_per_step=run.batch_size * digits.HEIGHT * digits.WIDTH // vq_config.downsampling**2,
    )


def _stop_on_sigterm() -> list[int]:
    """A list that is empty until SIGTERM arrives."""
    received: list[int] = []
    with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    return received
