"""Training: one program for the image tokenizer and for stages 1 and 2 of the model.

A Program (`train.program`) is what differs between them: how params are made and laid out, the batch of a
step, the loss. The loop of `train` is the same for both; the image tokenizer's program is in
`train.pictures`. A batch is a function of (seed, step) and the key of a step is
fold_in(root, step), so a resumed run repeats to the bit what an uninterrupted one does.

The loss of the model is traced from `train` through `make_step` and `model_objective` to
`diffusion.corrupt`, which hides tokens and weights them, and `diffusion.loss`, which sums. What a
configuration amounts to is in `train.runs`, where rows come from in `train.rows`.
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from mmada_jax import config as config_lib
from mmada_jax import nearby, storage
from mmada_jax.data import pipeline
from mmada_jax.devices import sharding
from mmada_jax.devices.distributed import connect_axes, together, watch_signals
from mmada_jax.diffusion import corrupt, loss
from mmada_jax.measure import held_out
from mmada_jax.model.model import Model
from mmada_jax.model.vision import Vision
from mmada_jax.nets import lora, transformer, vq
from mmada_jax.ranges import warn_without_effect
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.train import optim, pictures
from mmada_jax.train.metrics import Metrics, tell, warn
from mmada_jax.train.program import Objective, Program
from mmada_jax.train.rows import open_data, open_rows, say_left_out
from mmada_jax.train.runs import (
    ModelRun,
    Plan,
    VQRun,
    check_rows,
    describe,
    grid_of,
    held_base,
    image_tokenizer_path,
    parse,
    plan,
    same_in_all,
)
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.folder import (
    IMAGE_TOKENIZER,
    keep_image_tokenizer,
    open_image_tokenizer,
)
from mmada_jax.weights.quantized import held_in, in_8_bits, rest_dtype
from mmada_jax.weights.state import TrainState, all_finite, init_state, start_state, state_shardings
from mmada_jax.weights.workdir import check_workdir, claim_workdir, has_step, refuse_busy

# Fields of the configuration that decide what params a model has. A workdir holds one model, so a resumed
# run must have the same ones.
FIXED = (
    "program", "preset", "model", "text_vocab", "max_text", "image_size", "average", "adversarial",
    "lora",
)  # fmt: skip
# The values that they had before there were fields for them.
ABSENT = {"lora": config_lib.to_dict(lora.LoraConfig())}
ABSENT_VQ = {"average": 0.0, "adversarial": 0.0, "model": {}, "image_size": 0, "init": ""}
# Fields within these that only decide how the model is computed. A resumed run may change them.
FREE = ("model.attention", "model.dtype", "model.remat", "model.unroll")


def train(config: Mapping[str, Any], workdir: storage.Name) -> TrainState:
    """Trains until `config.steps`, from the newest checkpoint of the workdir if there is one.

    Raises ValueError before any compute, if the configuration is wrong or the workdir holds another run.
    SIGTERM and Ctrl-C save and return: `state.step` is then less than `config.steps`. Where there are
    several processes, all call this; the first one writes and prints.
    """
    # ---- Configuration --------------------------------------------------------------------------
    began = time.perf_counter()
    workdir = storage.path(workdir)
    with together("training") as same:
        run, mesh, what = check_run(config, workdir)
        refuse_busy(workdir)
        same |= same_in_all(run, workdir)
    connect_axes(mesh)
    with together("opening the data") as same:
        make = model_program if isinstance(what, Plan) else pictures.program
        program = make(run, workdir, mesh, what)
        same |= {"data": program.data}
    first_process = jax.process_index() == 0
    say = tell if first_process else lambda *_: None
    if first_process:
        warn_without_effect(run)

    # ---- State ----------------------------------------------------------------------------------
    optimizer = optim.make(run.optim, run.steps)
    optimizer = optim.averaged(optimizer, program.average) if program.average else optimizer
    objective = program.objective
    shapes, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
    n_params = sum(x.size for x in jax.tree.leaves(shapes.params))
    root = jax.random.key(run.seed)
    with (
        watch_signals(mesh) as signalled,  # outermost: a signal must not end the last save
        Checkpoints(workdir, run.keep) as checkpoints,
        jax.set_mesh(mesh),
    ):
        # Checked once more: another run in this workdir may have ended since.
        check_same(run, workdir)
        if program.images:
            keep_image_tokenizer(workdir, program.images)
        with together("writing to the workdir"):
            claim_workdir(workdir, config_lib.to_dict(run), program.texts, describe(run, what))
        if checkpoints.latest() is not None:
            state = checkpoints.restore(shapes, shardings)
        elif program.start:
            params = sharding.put_params(program.start, shardings.params, np.float32)
            if not all_finite(params):
                raise ValueError(f"config.init: the params in {run.init} are not finite; name others")
            state = start_state(params, optimizer, shardings)
        else:
            state = init_state(jax.random.fold_in(root, 0), objective.init_params, optimizer, shardings)
        first = int(state.step)
        if first >= run.steps:
            say(f"{workdir}: {first} steps are done already")
            return state
        say(
            f"{workdir}: {n_params:,} parameters, mesh {dict(mesh.shape)}, "
            + (f"resuming at step {first}" if first else f"from {getattr(run, 'init', '') or 'scratch'}")
        )

        # ---- Loop -------------------------------------------------------------------------------
        frozen, places = place_frozen(program, mesh)
        step_fn = make_step(objective, optimizer, mesh, shardings, program.accumulate, places)
        own = sharding.own_rows(mesh, run.batch_size)
        load = functools.partial(program.load, which=own)
        threads = pipeline.threads_of(run.load_threads, program.from_bucket)
        batches = pipeline.iterate(load, first, run.steps, threads, run.load_workers)
        skipped = pipeline.Skipped(run.max_skipped)
        metrics = Metrics(workdir, run.steps, first, program.flops_per_step, began)
        with contextlib.closing(batches), ThreadPoolExecutor(1) as ahead, metrics:
            # A thread waits for the rows of the next step while the devices work on this one.
            upcoming = ahead.submit(next, batches)
            for step in range(first, run.steps):
                # Rows that come while the devices still work cost nothing, so the wait begins after that.
                if step > first and not upcoming.done():
                    jax.block_until_ready(state.step)
                with metrics.waiting():
                    loaded = upcoming.result()
                if step + 1 < run.steps:
                    upcoming = ahead.submit(next, batches)
                skipped.count(loaded.skipped, len(own))
                batch = program.encode(sharding.put_batch(mesh, loaded.rows, own, run.batch_size))
                # Asked before the step is queued: the answer of several processes then comes before its
                # end.
                stop = signalled()
                state, values = step_fn(state, root, batch, *frozen)
                done = step + 1
                if step == first:  # speeds don't count the compilation
                    jax.block_until_ready(values)
                    metrics.restart_clock(done)
                stop = int(stop)
                measure = program.evaluate and (done % run.eval_every == 0 or done == run.steps)
                log = done % run.log_every == 0 or done == run.steps or measure
                save = done % run.save_every == 0 or done == run.steps or stop
                # Reading values waits for the step. At other steps the host runs ahead of the devices.
                if log:
                    values = {name: float(value) for name, value in values.items()} | skipped.values()
                    if measure:
                        with metrics.pausing():
                            values |= program.evaluate((state.params, *frozen), done, metrics)
                    values["lr"] = optim.learning_rate(run.optim, run.steps, state.opt_state)
                    values["failed_saves"] = checkpoints.failed
                    metrics.write(done, values, program.tokens_per_step)
                    if first_process and (remark := program.remark(values)):
                        warn(remark)
                if log or save:
                    streak = optim.check_streak(run.optim, state.opt_state, checkpoints.give_up)
                    sound = not streak and np.isfinite(float(values["loss"]))
                    # A state that may end in an error isn't saved, so that the next run resumes before
                    # it. At a signal it is, unless the newest checkpoint has all updates that were
                    # accepted.
                    if stop and not sound:
                        sound = checkpoints.accepted() != int(state.opt_state.accepted)
                    if save and (sound or done == run.steps):
                        with metrics.pausing():
                            metrics.flush()
                            checkpoints.save(state)
                if stop:
                    say(f"stopped by {signal.Signals(stop).name} after step {done}; run again to resume")
                    break
    return state


def check_run(
    config: Mapping[str, Any], workdir: storage.Name, vq_config: Mapping[str, Any] | None = None
) -> tuple[VQRun | ModelRun, jax.sharding.Mesh, Plan | vq.VQConfig]:
    """Parses a configuration and raises for whatever is wrong with it; nothing is computed or written.

    Returns the run, its mesh, and the plan of a model's run, or the architecture of an image tokenizer.
    `vq_config` is the configuration of the image tokenizer, if that is yet to be trained.
    """
    run, workdir = parse(config), storage.path(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    check_rows(run, mesh)
    check_same(run, workdir)
    nearby.use(run.cache_dir, run.cache_gib)
    if isinstance(run, ModelRun):
        to_train = vq_config and pictures.codec_of(parse(vq_config), workdir)
        what = plan(run, workdir, to_train, start=not has_step(workdir) or run.lora.rank > 0)
        if to_train:  # what is wrong with the data must be said before hours of the image tokenizer
            open_data(run, workdir, what)
            if run.eval_every:
                open_rows(run, workdir, what, "held_out", run.eval_rows)
    else:
        what = pictures.codec_of(run, workdir)
        grid_of(run, what)
    return run, mesh, what


def check_same(run: VQRun | ModelRun, workdir: storage.Path) -> None:
    """Raises ValueError if the workdir holds another run."""
    kept = ("image_tokenizer",) if has_step(workdir) and (workdir / IMAGE_TOKENIZER).is_dir() else ()
    # The architecture of an image tokenizer may be that of what it starts from.
    of_codec = isinstance(run, VQRun)
    kept, absent = (("init",), ABSENT_VQ) if of_codec else (kept, ABSENT)
    check_workdir(workdir, config_lib.to_dict(run), (*FIXED, *kept), FREE, absent)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
    accumulate: int = 1,
    frozen: Sequence[Any] = (),
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, root key, batch, *frozen) -> (state, metrics); the old state is donated.

    With `accumulate` the rows go through the model in that many parts, one after the other, which needs
    less memory and gives the same gradients but for rounding. `frozen` are the shardings of what the
    objective joins with the params, and isn't trained.
    """

    def gradients(params, rows, beside):
        def loss_fn(params):
            return objective.loss(objective.join(params, *beside), rows)

        (total, values), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.lax.with_sharding_constraint(grads, shardings.params), {"loss": total, **values}

    def step_fn(state, root, batch, *beside):
        key = jax.random.fold_in(jax.random.fold_in(root, 1), state.step)
        rows = objective.prepare(key, batch, state.step)
        if accumulate == 1:
            grads, values = gradients(state.params, rows, beside)
        else:
            # Row i goes into part i % accumulate: every device keeps its own rows.
            parts = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), rows
            )
            zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, state.params, rows, beside))
            add = functools.partial(jax.tree.map, jnp.add)
            (grads, values), _ = jax.lax.scan(
                lambda sums, part: (add(sums, gradients(state.params, part, beside)), None), zero, parts
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        values |= {"grad_norm": optax.tree.norm(grads), "skipped": optim.skipped(opt_state)}
        return TrainState(state.step + 1, params, opt_state), values

    everywhere = sharding.replicated(mesh)
    return sharding.jit(
        mesh,
        step_fn,
        in_shardings=(shardings, everywhere, sharding.batch_sharding(mesh), *frozen),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )


def place_frozen(program: Program, mesh: jax.sharding.Mesh) -> tuple[list[Any], list[Any]]:
    """What a program doesn't train, on the mesh, and its shardings; both empty if it trains all."""
    if program.frozen is None:
        return [], []
    if program.frozen_axes is None:
        places = jax.tree.map(lambda _: sharding.replicated(mesh), program.frozen)
    else:
        places = sharding.tree_shardings(mesh, program.frozen_axes, program.frozen)
    return [sharding.put_params(program.frozen, places)], [places]


class MaskedRows(NamedTuple):
    """Rows whose tokens are partly hidden, with what the loss needs beside them."""

    seen: corrupt.Corrupted
    valid_BL: jax.Array
    task_B: jax.Array


def model_objective(run: ModelRun, model: transformer.ModelConfig, vocab: Vocab) -> Objective:
    """The objective of the model: hide tokens of clean rows, predict them, sum the weighted losses."""
    tasks = [task for task, share in run.mixture.items() if share]

    def prepare(key, batch, step=None):
        del step
        return MaskedRows(corrupt.corrupt(key, batch, vocab, run.loss), batch.valid, batch.task)

    def loss_fn(params, rows):
        seen = rows.seen
        h_BLD = transformer.hidden_states(params, model, seen.tokens_BL, rows.valid_BL)
        total, each_B = loss.weighted_nll(
            h_BLD, transformer.head(params), seen.targets_BL, seen.weights_BL, run.loss_chunk
        )
        by_task = {
            f"loss_{task}": jnp.sum(jnp.where(rows.task_B == layout.TASKS.index(task), each_B, 0))
            for task in tasks
        }
        return total, by_task | {"scored": jnp.sum(seen.weights_BL != 0, dtype=jnp.float32)}

    if run.lora.rank:
        init = functools.partial(lora.init_adapters, config=model, lora=run.lora)
        join = lambda adapters, base: lora.beside(base, adapters, run.lora)  # noqa: E731
        return Objective(init, None, prepare, loss_fn, join)
    init = functools.partial(transformer.init_params, config=model)
    return Objective(init, transformer.param_axes(model), prepare, loss_fn)


def model_program(
    run: ModelRun, workdir: storage.Path, mesh: jax.sharding.Mesh, what: Plan | None = None
) -> Program:
    """The program of a model: its objective, on rows of its data."""
    what = what or plan(run, workdir, start=not has_step(workdir))
    # All processes open it, once in a run: all of them together verify its files.
    images = open_image_tokenizer(image_tokenizer_path(run, workdir))
    data = open_data(run, workdir, what, images)
    say_left_out(data, "data")
    # One row of each task: raises if no record of its sources can be used.
    data.load(0, [data.places.index((task, 0)) for task in data.rows])

    def encode(rows):
        return rows.batch

    def flops(values):  # the loss has logits only where tokens are scored
        logits = round(values["scored"]) * what.model.vocab
        return 3 * transformer.forward_flops(what.model, run.batch_size, what.shape.length, logits)

    evaluate = None
    if data.encodes or run.eval_every:
        vision = Vision.place(images.params, images.config, mesh)
        encode = vision.row_encoder(what.vocab, run.max_text)
    if run.eval_every:
        rows = open_rows(run, workdir, what, "held_out", run.eval_rows, images)
        say_left_out(rows, "held_out")
        evaluate = evaluation(run, what, vision, encode, rows)
    model, parts = what.model, {"start": what.start and what.start.params}
    if run.lora.rank:
        model = held_base(what.model, run.base_dtype)
        hold = in_8_bits if model.weights == "int8" else held_in
        frozen = hold(what.start.params, rest_dtype(run.base_dtype))
        parts = {"frozen": frozen, "frozen_axes": transformer.param_axes(model)}
    return Program(
        objective=model_objective(run, model, what.vocab),
        load=data.load,
        encode=encode,
        tokens_per_step=run.batch_size * what.shape.length,
        flops_per_step=flops,
        tokenizer=what.tokenizer,
        images=images,
        accumulate=run.accumulate,
        **parts,
        evaluate=evaluate,
        data=data.description,
        from_bucket=data.from_bucket,
    )


def evaluation(
    run: ModelRun,
    what: Plan,
    vision: Vision,
    encode: Callable[[pipeline.RawRows], layout.Batch],
    rows: pipeline.Pipeline,
) -> Callable[[Any, int, Metrics], dict[str, float]]:
    """A function (what is trained and what isn't, step, metrics) -> values on the held-out rows, which
    shows samples in the metrics. `rows` are loaded when it is first called, and are the same ever after.
    """
    mesh = vision.mesh
    own = sharding.own_rows(mesh, run.eval_rows)

    config = held_base(what.model, run.base_dtype) if run.lora.rank else what.model
    model = Model(
        config, what.vocab, what.tokenizer, vision.params, vision.config, what.max_text, what.grid, mesh
    )

    @functools.cache
    def batches():
        with jax.set_mesh(mesh):
            batch = encode(sharding.put_batch(mesh, rows.load(0, own).rows, own, run.eval_rows))
        return batch, multihost_utils.process_allgather(batch, tiled=True)

    def measure(parts, step, metrics):
        params = model_objective(run, config, what.vocab).join(*parts)
        batch, on_host = batches()
        nll = held_out.masked_nll(params, config, batch, what.vocab, chunk=run.loss_chunk or 2048)
        values = {f"held_out_{task}_{ratio}": x for task, of in nll.items() for ratio, x in of.items()}
        if run.samples:
            exact, picture, lines = held_out.generations(
                MMaDA(params, **vars(model)), on_host, run.samples, run.answer_block, run.seed
            )
            values |= exact
            metrics.show(step, picture, lines)
        return values

    return measure
