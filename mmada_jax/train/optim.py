"""Optimizers: AdamW with the settings of the reference, or Muon; and their learning rate over the steps.

A guard is around both: an update whose gradient isn't finite, or is suddenly much larger than earlier
gradients, is skipped and counted. Skipped updates change neither params nor moments.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmada_jax.ranges import Count, OnlyWith, Positive, Range, Ranged, Share, Weight


@dataclasses.dataclass(frozen=True)
class OptimConfig(Ranged):
    """AdamW or Muon, with a learning rate that rises to `lr` over `warmup` steps and then falls along a
    cosine to `floor` times `lr`.

    Weights of all kinds decay, norms and embeddings too, as in the reference, whose cosine always ends at
    0. `moments` is the dtype of the first moment at rest. With `spike`, an update is skipped if the norm of
    its gradient is more than `spike` times the mean norm of about the last `spike_window` accepted updates,
    once as many have been accepted. A run ends with an error when `max_skipped` updates in a row were
    skipped.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Range(0, 1e38)] = 5e-5  # the limit is about float32's largest number
    warmup: Count = 5000
    floor: Share = 0.0
    b1: Annotated[float, Range(0, 1, below=True)] = 0.9
    b2: Annotated[float, Range(0, 1, below=True)] = 0.999
    eps: Annotated[float, Range(0, 1)] = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.01
    clip: Weight = 1.0  # largest norm of a gradient, a longer one is scaled down; 0 is no limit
    moments: Literal["float32", "bfloat16"] = "float32"
    # 0: only updates with gradients that aren't finite are skipped
    spike: Annotated[float, Range(1, 1e6, above=True, also=0)] = 0.0
    spike_window: Annotated[Positive, OnlyWith("spike")] = 128
    max_skipped: Positive = 20


class GuardState(NamedTuple):
    """State of the optimizer: numbers of updates, the running mean of gradient norms, and the state of
    AdamW or Muon (`inner`)."""

    accepted: jax.Array
    skipped: jax.Array
    streak: jax.Array  # updates skipped in a row up to now; it stays once it has reached max_skipped
    mean_norm: jax.Array  # of the gradients of accepted updates
    inner: Any


def cosine_factor(step: Any, steps: int, warmup: int, floor: float = 0.0) -> Any:
    """The factor of the learning rate at a step: it rises linearly from 0 to 1 over `warmup` steps, then
    falls along floor + (1 - floor) (1 + cos(pi progress)) / 2 (arXiv 1608.03983, without restarts).

    For a step on the host numpy computes it: there jax would compile each operation by itself."""
    xp = jnp if isinstance(step, jax.Array) else np
    step = xp.asarray(step, np.float32)
    rise = step / max(1, warmup)
    progress = xp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
    cosine = floor + (1 - floor) * 0.5 * (1 + xp.cos(np.float32(np.pi) * progress))
    return xp.where(step < warmup, rise, cosine)


def make(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps; its state is a GuardState."""

    def lr(step):
        return config.lr * cosine_factor(step, steps, config.warmup, config.floor)

    if config.name == "adamw":
        update = optax.adamw(
            lr, config.b1, config.b2, config.eps, weight_decay=config.weight_decay,
            mu_dtype=config.moments,
        )  # fmt: skip
    else:
        update = optax.contrib.muon(
            lr,
            weight_decay=config.weight_decay,
            mu_dtype=config.moments,
            eps=config.eps,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # updates as large as AdamW's, so that one lr serves both
        )
    if config.clip:
        update = optax.chain(optax.clip_by_global_norm(config.clip), update)
    inner = optax.GradientTransformation(_lenient(update.init), _lenient(update.update))
    return _guard(inner, config)


def averaged(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Trains params["learned"] and lets the arrays beside it that have the same names follow as their
    exponential mean, with a `decay` that rises from 0.1 over the first accepted updates, as TensorFlow's.
    Other params are trained as ever. The state is that of `optimizer`, a GuardState."""

    def trained(tree):
        return {name: part for name, part in tree.items() if name not in tree["learned"]}

    def update(grads, state, params):
        updates, new = optimizer.update(trained(grads), state, trained(params))
        learned = jax.tree.map(lambda x, y: x + y, params["learned"], updates["learned"])
        n = new.accepted.astype(jnp.float32)
        rate = 1 - jnp.minimum(np.float32(decay), (1 + n) / (10 + n))
        rate *= (new.accepted - state.accepted).astype(jnp.float32)  # a skipped update changes nothing
        means = {name: params[name] for name in learned}
        return jax.tree.map(lambda mean, x: rate * (x - mean), means, learned) | updates, new

    return optax.GradientTransformation(lambda params: optimizer.init(trained(params)), update)


def _guard(inner: optax.GradientTransformation, config: OptimConfig) -> optax.GradientTransformation:
    """The optimizer `inner` with the guard: gradients that aren't finite or, with `spike`, much larger than
    usual change nothing but the counts."""
    spike, window = config.spike, config.spike_window

    def init(params):
        zero = jnp.int32(0)
        return GuardState(zero, zero, zero, jnp.float32(0), inner.init(params))

    def update(grads, state, params=None):
        norm = optax.tree.norm(grads).astype(jnp.float32)
        accept = jnp.isfinite(norm)
        if spike:
            accept &= (state.accepted < window) | (norm <= spike * state.mean_norm)

        def choose(new, old):
            return jax.tree.map(functools.partial(jnp.where, accept), new, old)

        updates, changed = inner.update(grads, state.inner, params)
        # A param of -0.0 plus an update of 0.0 is 0.0; only -0.0 leaves every param as it is, to the bit.
        nothing = jax.tree.map(lambda x: jnp.full_like(x, -0.0), updates)
        # The mean of all norms up to `window` updates, then an exponential mean.
        weight = 1 / jnp.minimum(state.accepted + 1, window).astype(jnp.float32)
        mean_norm = state.mean_norm + (norm - state.mean_norm) * weight
        taken = accept.astype(jnp.int32)
        return choose(updates, nothing), GuardState(
            accepted=state.accepted + taken,
            skipped=state.skipped + 1 - taken,
            # A streak that has reached max_skipped stays, since the host may look at it only later.
            streak=jnp.where(
                state.streak < config.max_skipped, (state.streak + 1) * (1 - taken), state.streak
            ),
            mean_norm=choose(mean_norm, state.mean_norm),
            inner=choose(changed, state.inner),
        )

    return optax.GradientTransformation(init, update)


def _lenient(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` where dtypes and ranks may be promoted: optax does so, and tests make it an error elsewhere."""

    def call(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args)

    return call


def skipped(opt_state: GuardState) -> jax.Array:
    """The number of updates that have been skipped so far."""
    return opt_state.skipped


def learning_rate(config: OptimConfig, steps: int, opt_state: GuardState) -> float:
    """The learning rate of the last accepted update, in a run of `steps` steps."""
    step = max(int(opt_state.accepted) - 1, 0)
    return config.lr * float(cosine_factor(step, steps, config.warmup, config.floor))


def check_streak(config: OptimConfig, opt_state: GuardState, give_up: Callable[[int], str]) -> int:
    """The number of updates in a row that have been skipped up to now.

    Raises FloatingPointError if it is `max_skipped` or more. Then `give_up` is called with the number of
    accepted updates, and says where the next run starts.
    """
    streak = int(opt_state.streak)
    if streak >= config.max_skipped:
        spike = f" or more than {config.spike:g} times the usual" if config.spike else ""
        raise FloatingPointError(
            f"{streak} updates in a row were skipped, {int(opt_state.skipped)} in all: the norms of their "
            f"gradients were not finite{spike}; the next run {give_up(int(opt_state.accepted))}. Lower "
            f"optim.lr, look at the data of these steps, or raise {'optim.spike or ' * bool(spike)}"
            "optim.max_skipped"
        )
    return streak


def _matrices(params: dict[str, Any]) -> dict[str, Any]:
    """The params that Muon takes as matrices, each with its input and its output axes.

    These are the weights of the transformer's blocks (axis 0 counts the layers) and the convolutions
    within the image tokenizer (places and input channels -> output channels). All other params, as
    embedding, head, norms, first and last convolutions, are left to AdamW (with Nesterov momentum, as in
    Muon itself)."""
    dims = {
        "q_DHK": ((1,), (2, 3)), "k_DGK": ((1,), (2, 3)), "v_DGK": ((1,), (2, 3)),
        "o_HKD": ((1, 2), (3,)), "gate_DF": ((1,), (2,)), "up_DF": ((1,), (2,)),
        "down_FD": ((1,), (2,)),
    }  # fmt: skip

    def of(name, value):
        if isinstance(value, Mapping):
            return {key: of(key, part) for key, part in value.items()}
        inner = name.endswith("_w") and name not in ("conv_in_w", "conv_out_w")
        axes = ((0, 1, 2), (3,)) if inner else dims.get(name)
        return axes and optax.contrib.MuonDimensionNumbers(*axes)

    return of("", params)
