"""Times ours against the same model in plain PyTorch: same weights, same machine, same run.

    mmada bench twin                       # the digits preset; two minutes on a CPU
    mmada bench twin --repeats 51 --json out.json

The logits of the two sides must agree before anything is timed. Then a training step, text
generation and image generation are timed in turns (ours, the twin's, ours, ...), so that whatever
else the machine does hits both. The claim is the RATIO of the medians, twin / ours; the times
themselves belong to one machine at one moment.

Cached text generation has a wider model than the presets and one row: its keys and values are stored
at the beginning of each block, and further steps compute the block alone, on both sides.

The twin is tests/torch_twin.py. Ours is timed alone where torch is missing or lacks the accelerator
that JAX has. Where optax is missing the training step ends in plain gradient descent: jax, flax and
numpy are enough, as on most machines with accelerators.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import timing
from mmada_jax.devices import sharding
from mmada_jax.diffusion import corrupt, denoise, loss, rules
from mmada_jax.nets import transformer
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import Vocab
from mmada_jax.weights import llada_keys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
VOCAB = Vocab(
    image_offset=128, codebook_size=128, rows=256, bos=1, eos=2, mask=3, pad=4, soi=5, eoi=6, t2i=7,
    mmu=8, r2i=9, start_header=10, end_header=11, end_turn=12,
)  # fmt: skip
FIRST_WORD = 16
MAX_TEXT, N_IMAGE = 20, 32
N_PROMPT, N_NEW = 20, 16
TEXT = rules.TextRule(steps=16, block=8)
IMAGE = rules.ImageRule(steps=12, guidance=2.0)
CACHED = transformer.ModelConfig(
    d_model=256, n_layers=6, n_heads=4, n_kv_heads=4, d_mlp=768, vocab=2048, max_len=384, dtype="float32",
    unroll=6,
)  # fmt: skip
N_CACHED_PROMPT, N_CACHED_NEW = 128, 256
CACHED_TEXT = rules.TextRule(block=32, cache="dual", never=(VOCAB.mask,))
OBJECTIVE = corrupt.LossConfig()
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 1.0

# Task -> function that does it once and returns when the result is there.
Tasks = dict[str, Callable[[], Any]]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of a run. Raises ValueError for options out of their range."""
    if args.rows < 4 or args.repeats < 1:
        raise ValueError(f"--rows is {args.rows}, at least 4; --repeats is {args.repeats}, at least 1")
    config = dataclasses.replace(transformer.PRESETS[args.preset], vocab=VOCAB.rows)
    data = make_data(args.rows, args.rows // 4)
    params = transformer.init_params(jax.random.key(0), config)
    model, why_not, difference = *load_twin(params, config), None
    if model is not None:
        difference = logits_difference(params, config, model, data["train"])
    sides = {"ours": our_tasks(params, config, data)}
    if model is not None:
        sides["twin"] = twin_tasks(model, data)
    load_before = os.getloadavg()[0]
    tasks = time_tasks(sides, args.repeats)
    cached_sides, cached = cached_tasks(CACHED, N_CACHED_PROMPT, N_CACHED_NEW)
    cached["repeats"] = max(1, args.repeats // 4)
    tasks |= time_tasks(cached_sides, cached["repeats"], warm_up=1)
    return {
        "preset": args.preset,
        "params": transformer.param_count(config),
        "rows": args.rows,
        "row_length": data["train"].tokens.shape[1],
        "repeats": args.repeats,
        "machine": timing.machine(),
        "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "twin": why_not or "timed",
        "logits_difference": difference,
        "cached": cached,
        "tasks": tasks,
    }


# ---------------------------------------------------------------------------------------- data


def make_data(n_train: int, n_generate: int) -> dict[str, layout.Batch]:
    """Random rows: a training batch (half t2i, a quarter lm, the rest mmu) and prompts."""
    rng = np.random.default_rng(0)

    def words(low, high):
        return rng.integers(FIRST_WORD, VOCAB.image_offset, rng.integers(low, high)).tolist()

    def image():
        return VOCAB.image_ids(rng.integers(0, VOCAB.codebook_size, N_IMAGE))

    def conversation():
        return [*words(3, 8), VOCAB.end_header, *words(3, 8)]

    n_t2i, n_lm = n_train // 2, n_train // 4
    train = [layout.t2i(VOCAB, words(4, 15), image(), MAX_TEXT) for _ in range(n_t2i)]
    train += [layout.lm(VOCAB, words(20, 60), MAX_TEXT + N_IMAGE + 3) for _ in range(n_lm)]
    train += [layout.mmu(VOCAB, image(), conversation(), MAX_TEXT) for _ in range(n_train - n_t2i - n_lm)]
    prompts = [words(N_PROMPT, N_PROMPT + 1) for _ in range(n_generate)]
    draw = [layout.t2i_generation(VOCAB, words(4, 15), N_IMAGE, MAX_TEXT) for _ in prompts]
    return {
        "train": layout.stack(train),
        "text": layout.continuation(VOCAB, prompts, N_NEW),
        "image": layout.stack(draw),
        "uncond": layout.stack([layout.drop_condition(VOCAB, row, MAX_TEXT) for row in draw]),
    }


# ---------------------------------------------------------------------------------------- ours


def our_tasks(params: Any, config: transformer.ModelConfig, data: Mapping[str, layout.Batch]) -> Tasks:
    """Training step, text and image generation of mmada_jax, each one jitted function."""
    train, text, image, uncond = (
        jax.tree.map(jnp.asarray, data[name]) for name in ("train", "text", "image", "uncond")
    )
    root = jax.random.key(0)

    @jax.jit
    def write(params, batch, key):
        return denoise.denoise(
            transformer.Network(params, config),
            batch.tokens,
            batch.valid,
            start=N_PROMPT,
            length=N_NEW,
            rule=TEXT,
            vocab=VOCAB,
            key=key,
        )

    @jax.jit
    def draw(params, batch, uncond, key):
        return denoise.denoise(
            transformer.Network(params, config),
            batch.tokens,
            batch.valid,
            start=MAX_TEXT + 2,
            length=N_IMAGE,
            rule=IMAGE,
            vocab=VOCAB,
            key=key,
            unconditional=(uncond.tokens, uncond.valid),
        )

    return {
        "training step": training_step(config, train),
        "text generation": lambda: jax.block_until_ready(write(params, text, root)),
        "image generation": lambda: jax.block_until_ready(draw(params, image, uncond, root)),
    }


def training_step(config: transformer.ModelConfig, batch: layout.Batch) -> Callable[[], Any]:
    """The step of mmada_jax/train/supervised.py; gradient descent where its requirements are missing."""
    root = jax.random.key(0)

    def prepare(key, batch, step=None):
        del step
        return corrupt.corrupt(key, batch, VOCAB, OBJECTIVE), batch.valid

    def loss_fn(params, rows):
        seen, valid_BL = rows
        h_BLD = transformer.hidden_states(params, config, seen.tokens_BL, valid_BL)
        total, _ = loss.weighted_nll(h_BLD, params["head_DV"], seen.targets_BL, seen.weights_BL)
        return total, {}

    init_params = functools.partial(transformer.init_params, config=config)
    try:
        from mmada_jax.train import optim, program, supervised
        from mmada_jax.weights.state import init_state, state_shardings
    except ImportError as error:
        print(f"{error.name} is missing: our training step is gradient descent instead of AdamW")
        mesh, state = None, init_params(root)

        @functools.partial(jax.jit, donate_argnums=0)
        def step_fn(params, root, batch):
            grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
            (value, _), grads = grad_fn(params, prepare(root, batch))
            lr = np.float32(LEARNING_RATE)
            return jax.tree.map(lambda p, g: p - lr * g, params, grads), value
    else:
        # One device, as the twin has.
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        optimizer = optim.make(
            optim.OptimConfig(lr=LEARNING_RATE, warmup=0, weight_decay=WEIGHT_DECAY, clip=CLIP),
            steps=1_000_000,
        )
        axes = transformer.param_axes(config)
        _, shardings = state_shardings(mesh, init_params, axes, optimizer)
        with jax.set_mesh(mesh):
            state = init_state(root, init_params, optimizer, shardings)
        batch = sharding.put_batch(mesh, jax.tree.map(np.asarray, batch))
        objective = program.Objective(init_params, axes, prepare, loss_fn)
        step_fn = supervised.make_step(objective, optimizer, mesh, shardings)

    def run():
        nonlocal state
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            state, values = step_fn(state, root, batch)
        return jax.block_until_ready((state, values))

    return run


# -------------------------------------------------------------------------------------- the twin


def load_twin(params: Any, config: transformer.ModelConfig) -> tuple[Any, str | None]:
    """The PyTorch model with our weights on the device that JAX uses, or None and why not."""
    try:
        import torch

        modeling = module("mmada_jax/weights/modeling_mmada.py")
    except ImportError as error:
        return None, f"{error.name} is missing, ours is timed alone"
    backend = jax.default_backend()
    if backend != "cpu" and not (backend == "gpu" and torch.cuda.is_available()):
        return None, f"torch doesn't run on this {backend}, ours is timed alone"
    fields = modeling.MMadaConfig(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        mlp_hidden_size=config.d_mlp,
        vocab_size=config.vocab,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
    )
    model = modeling.MMadaModelLM(fields)
    state = llada_keys.params_to_torch(params, config)
    model.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return model.to("cpu" if backend == "cpu" else "cuda"), None


@functools.cache
def module(path: str) -> Any:
    """A file of the project that isn't to be imported by name: it needs more than the package does."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def logits_difference(
    params: Any, config: transformer.ModelConfig, model: Any, batch: layout.Batch, limit: float = 1e-4
) -> float:
    """max |ours - twin| / max |twin| over the valid positions. SystemExit above `limit`."""
    import torch

    h_BLD = transformer.hidden_states(params, config, jnp.asarray(batch.tokens), batch.valid)
    ours = np.asarray(transformer.unembed(params, config, h_BLD))
    tensors = to_torch(batch, model)
    with torch.inference_mode():
        twin = model(tensors["tokens"], tensors["valid"]).logits.cpu().numpy()
    difference = float(np.abs(ours - twin)[batch.valid].max() / np.abs(twin[batch.valid]).max())
    if not difference <= limit:
        raise SystemExit(
            f"the logits of ours and of the twin differ by {difference:.1e} of the largest, the limit "
            f"is {limit:.0e}: they are two different models, and their times say nothing"
        )
    return difference


def twin_tasks(model: Any, data: Mapping[str, layout.Batch]) -> Tasks:
    """The same three tasks in PyTorch."""
    import torch

    twin = module("tests/torch_twin.py")
    train, text, image, uncond = (
        to_torch(data[name], model) for name in ("train", "text", "image", "uncond")
    )
    coefficients = [getattr(OBJECTIVE, task) for task in layout.TASKS]
    coefficients = torch.tensor(coefficients, device=train["tokens"].device)
    learner = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        learner.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )

    def run_train():
        return twin.train_step(learner, optimizer, train, VOCAB.mask, coefficients, CLIP).cpu()

    def write():
        return twin.generate_text(
            model,
            text["tokens"],
            # No row is padded, and without a mask PyTorch's attention is faster.
            None if text["valid"].all() else text["valid"],
            start=N_PROMPT,
            length=N_NEW,
            steps=TEXT.steps,
            block=TEXT.block,
            mask=VOCAB.mask,
        ).cpu()

    def draw():
        return twin.generate_image(
            model,
            image["tokens"],
            image["valid"],
            uncond["tokens"],
            uncond["valid"],
            start=MAX_TEXT + 2,
            length=N_IMAGE,
            steps=IMAGE.steps,
            guidance=IMAGE.guidance,
            mask=VOCAB.mask,
            offset=VOCAB.image_offset,
            codes=VOCAB.codebook_size,
            temperature=IMAGE.temperature,
        ).cpu()

    return {"training step": run_train, "text generation": write, "image generation": draw}


def cached_tasks(
    config: transformer.ModelConfig, n_prompt: int, n_new: int
) -> tuple[dict[str, Tasks], dict[str, Any]]:
    """Text generation of one row with a cache, on both sides, and what the report says of it. There `equal`
    is the share of new tokens that are the same on both sides."""
    params, vocab = transformer.init_params(jax.random.key(0), config), VOCAB
    words = np.random.default_rng(0).integers(FIRST_WORD, vocab.image_offset, n_prompt).tolist()
    batch = layout.continuation(vocab, [words], n_new)

    @jax.jit
    def write(params, tokens_BL, valid_BL):
        return denoise.denoise(
            transformer.Network(params, config),
            tokens_BL,
            valid_BL,
            start=n_prompt,
            length=n_new,
            rule=CACHED_TEXT,
            vocab=vocab,
            key=jax.random.key(0),
        )

    task = "cached text generation"
    sides = {"ours": {task: lambda: np.asarray(write(params, batch.tokens, batch.valid))}}
    about = {
        "params": transformer.param_count(config), "prompt": n_prompt, "new": n_new,
        "block": CACHED_TEXT.block, "equal": None,
    }  # fmt: skip
    model, _ = load_twin(params, config)
    if model is not None:
        tokens = to_torch(batch, model)["tokens"]
        of_rule = {"start": n_prompt, "length": n_new, "block": CACHED_TEXT.block, "mask": vocab.mask}
        generate = functools.partial(module("tests/torch_twin.py").generate_text_cached, **of_rule)
        sides["twin"] = {task: lambda: generate(model, tokens).cpu()}
        ours, twin = (np.asarray(tasks[task]())[:, n_prompt:] for tasks in sides.values())
        about["equal"] = float(np.mean(ours == twin))
    return sides, about


def to_torch(batch: layout.Batch, model: Any) -> dict[str, Any]:
    """A batch as a dict of tensors beside the model; integers are int64, as PyTorch wants ids."""
    import torch

    device = next(model.parameters()).device
    arrays = {name: np.asarray(x) for name, x in batch._asdict().items()}
    return {
        name: torch.tensor(x.astype(np.int64) if x.dtype == np.int32 else x, device=device)
        for name, x in arrays.items()
    }


# ------------------------------------------------------------------------------------ measuring


def time_tasks(sides: Mapping[str, Tasks], repeats: int, warm_up: int = 3) -> dict[str, dict[str, Any]]:
    """Task -> seconds of each side, of the clock and of all cores together, and twin / ours."""
    report = {}
    for task in sides["ours"]:
        runs = {side: tasks[task] for side, tasks in sides.items()}
        # PyTorch's worker threads spin for a while after a call: not on our account.
        times = report[task] = timing.take_turns(runs, repeats, warm_up, pause=0.02)
        if "twin" in sides:
            ours, twin = times["ours"], times["twin"]
            report[task] = times | {
                "ratio": twin["median"] / ours["median"], "cpu_ratio": twin["cpu"] / ours["cpu"]
            }  # fmt: skip
    return report


def as_text(report: Mapping[str, Any]) -> str:
    """The table, and what it takes to read it."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in report["machine"].items()),
        f"preset {report['preset']}: {report['params']:,} parameters, training batch of "
        f"{report['rows']} rows of {report['row_length']} tokens; {report['repeats']} repeats; "
        f"load {report['load'][0]} before, {report['load'][1]} after",
    ]
    if report["logits_difference"] is None:
        lines.append(report["twin"])
    else:
        lines.append(f"logits agree: largest difference {report['logits_difference']:.1e} of the largest")
    cached = report["cached"]
    lines.append(
        f"cached text generation: {cached['params']:,} parameters, a row of {cached['prompt']} tokens and "
        f"{cached['new']} new ones in blocks of {cached['block']}; {cached['repeats']} repeats"
        + ("" if cached["equal"] is None else f"; {100 * cached['equal']:.1f} % of the tokens are equal")
    )
    lines += [
        "",
        f"{'median (quartiles), ms':<22}{'ours':>30}{'PyTorch twin':>30}{'RATIO':>8}{'CPU ratio':>11}",
    ]
    for task, result in report["tasks"].items():
        row = f"{task:<22}"
        ms = timing.in_ms({side: result[side] for side in ("ours", "twin") if side in result})
        for side in ("ours", "twin"):
            row += f"{timing.as_text(ms[side]) if side in ms else '-':>30}"
        if "ratio" in result:
            row += f"{result['ratio']:>8.2f}{result['cpu_ratio']:>11.2f}"
        lines.append(row)
    if report["logits_difference"] is not None:
        lines.append(
            "RATIO is twin / ours by the clock; CPU ratio the same in seconds of all cores together."
        )
    return "\n".join(lines)
