"""Reinforcement learning: rollouts and their rewards, then inner updates on them, over and over.

Three jitted functions do the work, each compiled once for a task: generate, score, update. All that is
random is a function of (seed, iteration), so a resumed run repeats to the bit what an uninterrupted one
does.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from mmada_jax import config as config_lib
from mmada_jax.devices import sharding
from mmada_jax.devices.distributed import together, watch_signals
from mmada_jax.diffusion import loss
from mmada_jax.nets import transformer, vq
from mmada_jax.ranges import Count, FieldsOf, Positive, Range, Ranged, Seed, warn_without_effect
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import optim
from mmada_jax.train import supervised as train_lib
from mmada_jax.train.metrics import Metrics, png_of, tell, warn
from mmada_jax.train.optim import Config as OptimConfig
from mmada_jax.train.rl import prompts as prompts_lib
from mmada_jax.train.rl import unigrpo
from mmada_jax.train.rl.prompts import Prompt
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rollout import (
    Span,
    Task,
    lay_out,
    make_generate,
    prompt_ids,
    read,
    read_image,
    span,
)
from mmada_jax.train.rl.unigrpo import Rollout
from mmada_jax.train.runs import Mesh, relative
from mmada_jax.weights import llada_keys
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.folder import IMAGE_TOKENIZER, write_image_tokenizer
from mmada_jax.weights.state import TrainState, all_finite, start_state, state_shardings
from mmada_jax.weights.workdir import (
    TOKENIZER,
    check_workdir,
    claim_workdir,
    has_step,
    read_config,
    refuse_busy,
)

# In the progress line, and these where there are any.
SHOWN = ("reward", "groups_that_differ", "response_length", "kl", "clip_fraction")
COUNTS = ("failed_", "skipped")
# Groups of the configuration by which a checkpoint means something; of the objective only these.
FIXED = ("program", "init", "ahead", "reference_dtype", "objective")
OF_OBJECTIVE = ("mu", "kl")
# What config.json says of the computation beside the architecture, as `init` had it.
COMPUTED = ("attention", "pad", "remat", "unroll")
FREE = tuple(
    f"objective.{f.name}" for f in dataclasses.fields(unigrpo.Config) if f.name not in OF_OBJECTIVE
)


# Fields of the transformer that say how it is computed; the others are those of `init`.
HOW = ("dtype", "attention", "remat", "unroll")


@dataclasses.dataclass(frozen=True)
class RLRun(Ranged):
    """Reinforcement learning of the model in `init`, a workdir or a checkpoint, which is also the frozen
    reference (held in `reference_dtype`, and only if the objective asks for it; checkpoints have it).

    Paths are relative to the run's workdir, or absolute. `tasks` take turns, one each iteration, sorted
    by name, some of them several in a row (`turns`). `model` says how the model is computed (dtype,
    attention, remat, unroll). With `ahead` 1 the next rollout is generated while rewards are computed,
    by a policy that is older by one iteration.
    """

    program: Literal["rl"]
    init: str
    iterations: Positive
    tasks: dict[str, Task]
    objective: unigrpo.Config = dataclasses.field(default_factory=unigrpo.Config)
    image_tokenizer: str = ""
    data_root: str = ""
    model: Annotated[
        dict[str, Any], FieldsOf(transformer.Config, HOW, "the architecture is that of init")
    ] = dataclasses.field(default_factory=dict)
    reference_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ahead: Annotated[int, Range(0, 1)] = 0
    seed: Seed = 0
    save_every: Positive = 10
    keep: Positive = 2
    log_every: Positive = 1
    samples_every: Count = 10  # iterations between saved transcripts and images; 0 is never
    loss_chunk: Positive | None = None  # positions of a device that have logits at a time
    accumulate: Positive = 1  # parts that an update's rows go through the model in
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def __post_init__(self):
        super().__post_init__()
        if not self.tasks:
            raise ValueError("config.tasks is empty; name at least one")

    @property
    def cycle(self) -> list[str]:
        """Whose turn it is, over and over."""
        return [name for name in sorted(self.tasks) for _ in range(self.tasks[name].turns)]

    def turn(self, iteration: int) -> tuple[str, int]:
        """The task of an iteration, and how many turns it had before."""
        rounds, place = divmod(iteration, len(self.cycle))
        name = self.cycle[place]
        return name, rounds * self.tasks[name].turns + place - self.cycle.index(name)


class Scored(NamedTuple):
    """Rows under a mask, with what the rollout's policy and the anchor of the KL give to their tokens."""

    seen_RL: jax.Array
    scored_RL: jax.Array
    weight_R: jax.Array
    old_RL: jax.Array
    anchor_RL: jax.Array


class Chosen(NamedTuple):
    """The S rows that an update is made on, their advantages, and what they count in the loss."""

    which_S: np.ndarray
    advantage_S: np.ndarray
    weight_S: np.ndarray


class Batch(NamedTuple):
    """What an update takes: R scored rows, the S of them that it is made on, and whether the policy is
    still that of the rollout."""

    scored: Scored
    targets_RL: jax.Array
    valid_RL: jax.Array
    chosen: Chosen
    fresh_S: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loops need to know of a task: its prompts, the shape of its rows, three jitted functions."""

    task: Task
    at: Span
    prompts: Sequence[Prompt]
    rewards: Combined
    order: grain.MapDataset  # position -> index of a prompt, shuffled anew in every epoch
    objective: train_lib.Objective
    generate: Callable[..., Rollout]
    score: Callable[..., Scored]
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    unreadable: set[pathlib.Path] = dataclasses.field(default_factory=set)  # images that others replaced


def train(config: Mapping[str, Any], workdir: str | pathlib.Path) -> TrainState:
    """Trains until `config.iterations`, from the newest checkpoint of the workdir if there is one.

    Raises ValueError or OSError for what doesn't fit before any compute. SIGTERM and Ctrl-C save
    when the iteration is complete and return. Where there are several processes, all call this; the
    first one computes the rewards, writes and prints.
    """
    # ---- Configuration --------------------------------------------------------------------------
    began = time.perf_counter()
    workdir = pathlib.Path(workdir)
    with together("reinforcement learning") as same:
        run, mesh, prompts, rewards = check(config, workdir)
        refuse_busy(workdir)
        model = load(run, workdir, mesh)
        check_model(run, model, prompts, rewards)
        same |= train_lib.start_of(run, workdir)
    first_process = jax.process_index() == 0
    say = tell if first_process else lambda *_: None
    if first_process:
        warn_without_effect(run)

    # ---- State ----------------------------------------------------------------------------------
    mu = run.objective.mu
    optimizer = optim.make(run.optim, run.iterations * mu)
    root = jax.random.key(run.seed)
    with (
        watch_signals(mesh) as signalled,  # until the last save is complete
        Checkpoints(workdir, run.keep) as checkpoints,
        ThreadPoolExecutor(1) as pool,
        contextlib.ExitStack() as stack,
        jax.set_mesh(mesh),
    ):
        for combined in rewards.values():
            stack.enter_context(combined)
        check_same(run, workdir)  # another run may have just ended
        claim_workdir(workdir, description(run, model), {TOKENIZER: model.tokenizer.to_json()})
        keep_image_tokenizer(workdir, model)
        shapes, shardings = shapes_of(model, optimizer, mesh)
        programs = {
            name: make_program(run, name, model, prompts[name], rewards[name], optimizer, mesh, shardings)
            for name in run.tasks
        }
        if checkpoints.latest() is None:
            reference, ahead = frozen(model.params, run), None
            state = start_state(model.params, optimizer, shardings)
        else:
            state, reference, ahead = resume(run, model, programs, checkpoints, shapes, shardings)
        first = int(state.step) // mu
        model = dataclasses.replace(model, params=None)  # the updates take this memory
        if first >= run.iterations:
            say(f"{workdir}: {first} iterations are done already")
            return state
        say(
            f"{workdir}: {run.objective.masking}, mesh {dict(mesh.shape)}, "
            + (f"resuming at iteration {first}" if first else f"starting from {run.init}")
        )

        # ---- Loop: rollout and rewards ----------------------------------------------------------
        def roll(iteration):
            program = programs[run.turn(iteration)[0]]
            asked, given = inputs(run, model, program, iteration)
            return asked, program.generate(state.params, *given)

        def score(iteration, rollout):
            program = programs[run.turn(iteration)[0]]
            key = jax.random.fold_in(jax.random.fold_in(root, 3), iteration)
            return [program.score(state.params, reference, rollout, key, n) for n in range(mu)]

        with Metrics(workdir, run.iterations, first, began=began) as metrics:
            compiled: set[str] = set()
            for iteration in range(first, run.iterations):
                name, _ = run.turn(iteration)
                program = programs[name]
                calls = {f"updates of {name}", f"rollouts of {run.turn(iteration + run.ahead)[0]}"}
                compiles, compiled = not calls <= compiled, compiled | calls
                clock = Clock()
                asked, rollout, scored = ahead or (*roll(iteration), None)
                host = multihost_utils.process_allgather(rollout, tiled=True)
                clock.lap("rollout")
                responses = read(model, program.task, program.at, host.tokens_RL)
                judged = pool.submit(judge, program, asked, responses)
                # By the policy that made the rollout, and while the rewards are computed.
                scored = scored or score(iteration, rollout)
                if run.ahead:
                    next_asked, next_rollout = roll(iteration + 1)
                    ahead = next_asked, next_rollout, score(iteration + 1, next_rollout)
                jax.block_until_ready(scored)
                clock.lap("scores")
                with metrics.waiting():
                    total_R, each = judged.result()
                if jax.process_count() > 1:
                    total_R, each = multihost_utils.broadcast_one_to_all((total_R, each))
                clock.lap("rewards")

                # ---- Inner updates --------------------------------------------------------------
                chosen, values = choose(run, program.task, total_R)
                of_updates = []
                for n in range(mu):
                    fresh_S = np.full(chosen.which_S.shape, n == 0 and not run.ahead)
                    on_mesh = sharding.put_batch(mesh, (chosen, fresh_S))
                    batch = Batch(scored[n], rollout.tokens_RL, rollout.valid_RL, *on_mesh)
                    state, of_update = program.update(state, root, batch)
                    of_updates.append(of_update)
                of_updates = jax.device_get(of_updates)
                clock.lap("updates")

                # ---- What there is to see -------------------------------------------------------
                done, stop = iteration + 1, int(signalled())
                if compiles:
                    metrics.restart_clock(done)
                if done % run.log_every == 0 or done == run.iterations:
                    known = None if run.ahead or compiles else clock
                    values |= measures(program, host, each, of_updates, known)
                    values["seconds_waiting_for_rewards"] = clock.seconds["rewards"]
                    values = {f"{name}/{key}": float(value) for key, value in values.items()}
                    shown = [f"{name}/{key}" for key in SHOWN] + [
                        key for key, n in values.items() if n and key.split("/")[-1].startswith(COUNTS)
                    ]
                    values["lr"] = optim.learning_rate(run.optim, run.iterations * mu, state.opt_state)
                    values["failed_saves"] = checkpoints.failed
                    metrics.write(done, values, program.at.row * len(host.tokens_RL), shown)
                if run.samples_every and iteration % run.samples_every < len(run.cycle) and first_process:
                    text, png = samples(asked, responses, total_R, each, run.objective.responses)
                    metrics.save_samples(f"{iteration:06}-{name}", text, png)
                log = done % run.log_every == 0 or done == run.iterations
                save = done % run.save_every == 0 or done == run.iterations or stop
                if log or save:
                    streak = optim.check_streak(run.optim, state.opt_state, checkpoints.give_up)
                    sound = not streak and np.isfinite(of_updates[-1]["loss"])
                    if stop and not sound:  # unless it is saved already
                        sound = checkpoints.accepted() != int(state.opt_state.accepted)
                    if save and (sound or done == run.iterations):
                        with metrics.pausing():
                            checkpoints.save(bundle(state, reference, ahead and ahead[1:]))
                if stop:
                    name = signal.Signals(stop).name
                    say(f"stopped by {name} after iteration {done}; run again to resume")
                    break
    return state


# ---- Before the loop -----------------------------------------------------------------------------


def check(
    config: Mapping[str, Any], workdir: str | pathlib.Path
) -> tuple[RLRun, jax.sharding.Mesh, dict[str, Sequence[Prompt]], dict[str, Combined]]:
    """The run, its mesh, prompts and rewards of each task. Raises for whatever is wrong with them."""
    run, workdir = config_lib.from_dict(RLRun, config), pathlib.Path(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    check_rows(run, mesh)
    check_same(run, workdir)
    prompts, rewards = {}, {}
    for name, task in run.tasks.items():
        try:
            settings = {
                reward: {
                    key: str(relative(value, workdir)) if key == "folder" else value
                    for key, value in of_reward.items()
                }
                for reward, of_reward in task.reward_settings.items()
            }
            rewards[name] = Combined(task.rewards, settings, task.reward_limit)
            prompts[name] = prompts_lib.open_prompts(task.data, relative(run.data_root, workdir))
        except (ValueError, OSError, ImportError) as error:
            kind = next(kind for kind in (ValueError, OSError, ImportError) if isinstance(error, kind))
            raise kind(f"config.tasks.{name}: {error}") from error
    return run, mesh, prompts, rewards


def check_same(run: RLRun, workdir: pathlib.Path) -> None:
    """Raises ValueError if the workdir is that of another run."""
    # A rollout in flight is that of its prompts, and scored under its masks.
    fixed, free = ((*FIXED, "tasks", "seed"), ()) if run.ahead else (FIXED, FREE)
    if (workdir / IMAGE_TOKENIZER).is_dir():
        fixed += ("image_tokenizer",)
    check_workdir(workdir, config_lib.to_dict(run), fixed, free)


def check_rows(run: RLRun, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the rows of a rollout or of an update can't be spread over the devices."""
    shards, G = mesh.shape["data"] * mesh.shape["fsdp"], run.objective.responses
    for name, task in run.tasks.items():
        for what, rows, parts in (
            ("groups", task.groups * G, shards),
            ("update_groups", task.kept * G, shards * run.accumulate),
        ):
            if rows % parts:
                raise ValueError(
                    f"config.tasks.{name}: {what} times {G} responses are {rows} rows, which can't be "
                    f"split into {parts} parts ({shards} data shards of mesh {dict(mesh.shape)}, "
                    f"accumulate {run.accumulate}); choose {what} so that they can"
                )


def check_model(
    run: RLRun,
    model: MMaDA,
    prompts: Mapping[str, Sequence[Prompt]],
    rewards: Mapping[str, Combined],
) -> None:
    """Raises ValueError if a task's rules, prompts or rewards don't fit the model."""
    for name, task in run.tasks.items():
        try:
            if task.layout != "lm_chat" and model.vision is None:
                raise ValueError(
                    f"layout {task.layout} needs an image tokenizer; name it in config.image_tokenizer"
                )
            at = span(task, model.vocab, model.n_image, model.max_text)
            if at.row > model.config.max_len:
                raise ValueError(
                    f"rows have {at.row} tokens, the model takes {model.config.max_len}; lower max_prompt "
                    "or max_new"
                )
            for prompt in prompts[name]:
                if task.layout == "mmu" and prompt.image is None:
                    raise ValueError(
                        f"the prompt {prompt.text[:40]!r} has no image; layout mmu asks about one"
                    )
                prompt_ids(model, task, prompt)
            images = None
            if task.layout == "t2i":
                size = (*model.image_size, model.vision.config.pixel_channels)
                images = np.broadcast_to(np.float32(0), (len(prompts[name]), *size))
            texts, answers = ([getattr(p, field) for p in prompts[name]] for field in ("text", "answer"))
            rewards[name].check(texts, answers, images)
        except ValueError as error:
            raise ValueError(f"config.tasks.{name}: {error}") from error


def load(run: RLRun, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> MMaDA:
    """The model that the run starts from, float32 on the mesh; of a run that goes on, what its workdir says
    of it, without params, and nothing is read of `init`. Raises FileNotFoundError or ValueError if there is
    none."""
    if not run.init:
        raise ValueError("config.init is empty; name the workdir of a model, as that of configs/cot.py")
    vision = relative(run.image_tokenizer, workdir) if run.image_tokenizer else None
    computed = read_config(workdir).get("computed") if has_step(workdir) else None
    if computed is None:  # none of an older version
        model = MMaDA.load(relative(run.init, workdir), mesh, "float32", image_tokenizer=vision)
        if not all_finite(model.params):
            raise ValueError(f"config.init: the params in {run.init} are not finite; name others")
        computed = {}
    else:
        model = MMaDA.load(workdir, mesh, "float32", weights=False)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **computed | run.model))


def keep_image_tokenizer(workdir: pathlib.Path, model: MMaDA) -> None:
    """Copies the image tokenizer into the workdir, which then needs nothing of what it began with; the
    first process does."""
    vision, path = model.vision, workdir / IMAGE_TOKENIZER
    if jax.process_index() == 0 and vision and not path.exists():
        write_image_tokenizer(path, vision.config, jax.device_get(vision.params))


def description(run: RLRun, model: MMaDA) -> dict[str, Any]:
    """What the workdir's config.json says: the run, the model as a checkpoint's does, its computation."""
    values = llada_keys.config_to_hf(model.config, model.vocab, model.grid, model.max_text)
    computed = {name: getattr(model.config, name) for name in COMPUTED}
    return config_lib.to_dict(run) | {
        "architecture": values | {"dtype": model.config.dtype},
        "computed": computed,
        "generation": model.defaults.values(),
    }


def shapes_of(model: MMaDA, optimizer: Any, mesh: jax.sharding.Mesh) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the state."""
    init = functools.partial(transformer.init_params, config=model.config)
    return state_shardings(mesh, init, transformer.param_axes(model.config), optimizer)


def frozen(params: Any, run: RLRun) -> Any:
    """The reference, a copy of the params that lies as they do (the updates donate what they are given);
    None if the objective asks for none."""
    if run.objective.kl != "reference":
        return None
    return jax.tree.map(lambda x: jnp.array(x, run.reference_dtype, copy=True), params)


def bundle(state: TrainState, reference: Any, flight: tuple[Rollout, list[Scored]] | None) -> TrainState:
    """The state as a checkpoint holds it: with the reference, and a rollout in flight with its scores."""
    more = {} if reference is None else {"reference": reference}
    if flight:
        rollout, scored = flight
        more["rollout"] = rollout._asdict()
        more["scored"] = {str(n): of_update._asdict() for n, of_update in enumerate(scored)}
    return state._replace(opt_state={"optimizer": state.opt_state} | more)


def resume(
    run: RLRun,
    model: MMaDA,
    programs: Mapping[str, Program],
    checkpoints: Checkpoints,
    shapes: TrainState,
    shardings: TrainState,
) -> tuple[TrainState, Any, tuple[list[Prompt], Rollout, list[Scored]] | None]:
    """What the newest whole checkpoint holds: the state, the reference, and with `ahead` the rollout that
    was in flight, with its prompts and scores."""
    mu, flight = run.objective.mu, None
    reference = jax.eval_shape(functools.partial(frozen, run=run), shapes.params)

    def in_flight(step):
        iteration = int(step) // mu
        program = programs[run.turn(iteration)[0]]
        return program, *inputs(run, model, program, iteration)

    def layout(step):
        flight = None
        if run.ahead:  # its shape is that of its task
            program, _, given = in_flight(step)
            rollout = jax.eval_shape(program.generate, shapes.params, *given)
            scored = jax.eval_shape(program.score, shapes.params, reference, rollout, jax.random.key(0), 0)
            flight = rollout, [scored] * mu
        rows = jax.tree.map(lambda _: sharding.batch_sharding(model.mesh), flight)
        return (
            bundle(shapes, reference, flight),
            bundle(shardings, reference and shardings.params, rows),
        )

    state = checkpoints.restore_as(layout)
    held = state.opt_state
    if run.ahead:
        flight = Rollout(**held["rollout"]), [Scored(**held["scored"][str(n)]) for n in range(mu)]
    state = state._replace(opt_state=held["optimizer"])
    return state, held.get("reference"), flight and (in_flight(state.step)[1], *flight)


# ---- The three functions -------------------------------------------------------------------------


def make_program(
    run: RLRun,
    name: str,
    model: MMaDA,
    prompts: Sequence[Prompt],
    rewards: Combined,
    optimizer: Any,
    mesh: jax.sharding.Mesh,
    shardings: TrainState,
) -> Program:
    """The program of a task; nothing is compiled yet."""
    task = run.tasks[name]
    at = span(task, model.vocab, model.n_image, model.max_text)
    seed = int.from_bytes(hashlib.sha256(f"{run.seed} {name}".encode()).digest()[:4])
    order = grain.MapDataset.range(len(prompts)).seed(seed).shuffle().repeat()
    objective = make_objective(run, model, at)
    return Program(
        task,
        at,
        prompts,
        rewards,
        order,
        objective,
        make_generate(mesh, model.config, model.vocab, at, shardings.params),
        make_score(run, model, at, mesh, shardings.params),
        train_lib.make_step(objective, optimizer, mesh, shardings, run.accumulate),
    )


def make_score(
    run: RLRun, model: MMaDA, at: Span, mesh: jax.sharding.Mesh, params: Any
) -> Callable[..., Scored]:
    """The jitted (params, reference or None, rollout, key, n) -> rows of inner update n, scored by both."""
    objective, vocab = run.objective, model.vocab

    def score(params, reference, rollout, key, n):
        masked = unigrpo.hide(key, rollout, n, vocab.mask, objective.masking, objective)

        def log_probs(params):
            h_RLD = transformer.hidden_states(params, model.config, masked.seen_RL, rollout.valid_RL)
            head_DV, targets_RL = vocabulary(params, rollout.tokens_RL, at, vocab)
            return loss.token_log_probs(h_RLD, head_DV, targets_RL, masked.scored_RL, run.loss_chunk)

        # By "exact" the rollout has seen the very same rows.
        recorded = objective.masking in ("exact", "every")
        old_RL = rollout.logp_RL if recorded else log_probs(params)
        anchor_RL = old_RL if reference is None else log_probs(reference)
        return Scored(*masked, old_RL, anchor_RL)

    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.jit(
        score,
        in_shardings=(
            params,
            params if objective.kl == "reference" else None,
            rows,
            everywhere,
            everywhere,
        ),
        out_shardings=rows,
        compiler_options=sharding.compiler_options(mesh),
    )


def make_objective(run: RLRun, model: MMaDA, at: Span) -> train_lib.Objective:
    """The objective on rows that were scored before: a sum over rows, one for all tasks."""

    def prepare(key, batch):
        def take(x_R):
            return sharding.constrain(x_R[batch.chosen.which_S], "batch", *(None,) * (x_R.ndim - 1))

        rows = jax.tree.map(take, (batch.scored, batch.targets_RL, batch.valid_RL))
        return rows, batch.chosen, batch.fresh_S

    def loss_fn(params, prepared):
        (scored, targets_SL, valid_SL), chosen, fresh_S = prepared
        h_SLD = transformer.hidden_states(params, model.config, scored.seen_RL, valid_SL)
        head_DV, targets_SL = vocabulary(params, targets_SL, at, model.vocab)

        def of_new(new_SL):
            # What the policy has just been scored by is what it is scored by now, to the bit.
            old_SL = jnp.where(fresh_S[:, None], jax.lax.stop_gradient(new_SL), scored.old_RL)
            return unigrpo.objective(
                new_SL,
                old_SL,
                old_SL if run.objective.kl == "old" else scored.anchor_RL,
                chosen.advantage_S,
                scored.scored_RL,
                scored.weight_R * chosen.weight_S,
                run.objective.clip,
                run.objective.beta,
            )

        return loss.of_log_probs(of_new, h_SLD, head_DV, targets_SL, scored.scored_RL, run.loss_chunk)

    init = functools.partial(transformer.init_params, config=model.config)
    return train_lib.Objective(init, transformer.param_axes(model.config), prepare, loss_fn)


def vocabulary(params: Any, tokens_RL: jax.Array, at: Span, vocab: Any) -> tuple[jax.Array, jax.Array]:
    """The part of the head that a response is drawn from, and the tokens as its columns."""
    first, size = at.rule.vocabulary(vocab)
    head_DV = params["head_DV"]
    return head_DV if size is None else head_DV[:, first : first + size], tokens_RL - first


# ---- Rewards -------------------------------------------------------------------------------------


def inputs(run: RLRun, model: MMaDA, program: Program, iteration: int) -> tuple[list[Prompt], tuple]:
    """The prompts of an iteration, one for each row, and what `generate` takes beside the params."""
    task, G = program.task, run.objective.responses
    _, turn = run.turn(iteration)
    asked = [readable(model, program, turn * task.groups + p) for p in range(task.groups)]
    job = lay_out(model, task, asked, G)
    rows, other = (
        x and sharding.put_batch(model.mesh, (x.tokens, x.valid)) for x in (job.rows, job.unconditional)
    )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 2), iteration)
    return [prompt for prompt in asked for _ in range(G)], (*rows, key, other)


def readable(model: MMaDA, program: Program, position: int) -> Prompt:
    """The prompt at a position, with the pixels that it asks about. Where its file can't be read, that is
    reported and the next prompt stands in. Raises ValueError if there is none."""
    first, n = program.order[position], len(program.prompts)
    for i in range(n):
        prompt = program.prompts[(first + i) % n]
        if program.task.layout != "mmu":
            return prompt
        try:
            return prompt._replace(image=read_image(prompt.image, model.image_size))
        except (ValueError, OSError) as error:
            if prompt.image not in program.unreadable and jax.process_index() == 0:
                warn(f"{error}; another prompt stands in")
            program.unreadable.add(prompt.image)
    raise ValueError(f"none of the images of {n} prompts can be read; the last is {prompt.image}")


def judge(
    program: Program, asked: Sequence[Prompt], responses: tuple[list[str], np.ndarray | None]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards of R responses: their weighted sum [R], and each [R] by its name."""
    texts, images = responses
    if jax.process_index() == 0:
        prompts, answers = [prompt.text for prompt in asked], [prompt.answer for prompt in asked]
        return program.rewards(prompts, texts, images, answers)
    nothing_R = np.zeros(len(asked), np.float32)
    return nothing_R, dict.fromkeys(program.task.rewards, nothing_R)


def choose(run: RLRun, task: Task, total_R: np.ndarray) -> tuple[Chosen, dict[str, float]]:
    """The rows of the updates, and what there is to say of the rewards."""
    G = run.objective.responses
    rewards_PG = total_R.reshape(task.groups, G)
    advantage_PG = unigrpo.advantages(rewards_PG, run.objective.normalise)
    differ_P = np.ptp(rewards_PG, axis=1) > 0
    kept_K = np.arange(task.groups)
    counts_K = np.ones(task.groups, bool)
    if task.update_groups is not None:
        kept_K = np.argsort(~differ_P, kind="stable")[: task.update_groups]
        counts_K = differ_P[kept_K]
    weight_K = counts_K / np.float32(max(1, np.sum(counts_K)) * G)
    values = {
        "reward": np.mean(total_R),
        "reward_deviation": np.mean(np.std(rewards_PG, axis=1)),
        "advantage_deviation": np.std(advantage_PG),
        "groups_that_differ": np.mean(differ_P),
    }
    rows_S = (kept_K[:, None] * G + np.arange(G)[None]).ravel().astype(np.int32)
    return Chosen(rows_S, advantage_PG[kept_K].ravel(), np.repeat(weight_K, G).astype(np.float32)), values


# ---- What there is to see ------------------------------------------------------------------------


class Clock:
    """Seconds between laps, by name."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a lap."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def measures(
    program: Program,
    host: Rollout,
    each: Mapping[str, np.ndarray],
    updates: list[dict[str, Any]],
    clock: Clock | None,
) -> dict[str, float]:
    """Metrics of a rollout and its updates; without a clock no speeds, where they overlap
    or where something was compiled."""
    response_RL = host.response_RL
    length_R = response_RL.sum(axis=1)
    out = {name: np.mean([values[name] for values in updates]) for name in updates[0]}
    out |= {f"reward_{reward}": np.mean(value_R) for reward, value_R in each.items()}
    out |= {f"failed_{reward}": n for reward, n in program.rewards.failures.items()}
    if program.task.layout == "mmu":
        out["failed_images"] = len(program.unreadable)
    out |= {"response_length": length_R.mean(), "entropy": host.entropy_RL[response_RL].mean()}
    if clock is None:
        return out
    seen = len(updates) * host.valid_RL.sum() * program.task.kept / program.task.groups
    return out | {
        "rollout_tokens_per_second": length_R.sum() / clock.seconds["rollout"],
        "update_tokens_per_second": seen / clock.seconds["updates"],
    }


def samples(asked, responses, total_R, each, G) -> tuple[bytes, bytes]:
    """Every response of the first prompts as Markdown; and their images as a PNG, empty without any."""
    texts, images = responses
    lines, n = [], 4 * G
    for i, (prompt, text) in enumerate(zip(asked[:n], texts[:n], strict=True)):
        if i % G == 0:
            lines.append(f"\n## {prompt.text}\n\nanswer: {prompt.answer}\n\n")
        parts = ", ".join(f"{key} {value_R[i]:.3g}" for key, value_R in each.items())
        lines.append(f"- {total_R[i]:.3g} ({parts}) {text!r}\n")
    png = b""
    if images is not None:
        grid = vq.to_uint8(images[:n])
        grid = np.concatenate(
            [np.concatenate(list(grid[i : i + G]), axis=1) for i in range(0, len(grid), G)]
        )
        png = png_of(Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid))
    return "".join(lines).encode(errors="replace"), png
