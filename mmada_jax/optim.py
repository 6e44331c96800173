"""Optimizers: AdamW with the reference's settings, Muon as an option; cosine with warm-up and floor."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """AdamW or Muon. `floor` is the share of the learning rate that the cosine ends at.

    The reference decays everything, norms and embeddings too, and its cosine always ends at 0.
    `moments` is the dtype of the first moment at rest.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-5
    warmup: int = 5000
    floor: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"


# As many bad gradients in a row are no accident.
MAX_SKIPPED = 20


def cosine_factor(step: Any, steps: int, warmup: int, floor: float = 0.0) -> Any:
    """The learning rate's factor: linear 0 -> 1 over `warmup` steps, then a cosine down to `floor`."""
    step = jnp.asarray(step, jnp.float32)
    rise = step / max(1, warmup)
    progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
    cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(np.float32(np.pi) * progress))
    return jnp.where(step < warmup, rise, cosine)


def make(config: Config, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of `steps` steps.

    A gradient that isn't finite changes nothing and is counted (`skipped` reads the count).
    """

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
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # updates as large as AdamW's, so that one lr serves both
        )
    if config.clip:
        update = optax.chain(optax.clip_by_global_norm(config.clip), update)
    update = optax.apply_if_finite(update, max_consecutive_errors=2**30)
    return optax.GradientTransformation(_lenient(update.init), _lenient(update.update))


def _lenient(f: Callable[..., Any]) -> Callable[..., Any]:
    """optax promotes dtypes and ranks implicitly; our own code may be run where that is an error."""

    def call(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args)

    return call


def skipped(opt_state: optax.ApplyIfFiniteState) -> Any:
    """How many updates have been skipped so far because the gradient wasn't finite."""
    return opt_state.total_notfinite


def check_finite(opt_state: optax.ApplyIfFiniteState) -> None:
    """Raises FloatingPointError if the last MAX_SKIPPED gradients were all not finite."""
    if int(opt_state.notfinite_count) >= MAX_SKIPPED:
        raise FloatingPointError(
            f"the last {int(opt_state.notfinite_count)} gradients were not finite and were skipped; "
            "the params are those before. Lower optim.lr, or look at the data of these steps"
        )


def _matrices(params: dict[str, Any]) -> dict[str, Any]:
    """Muon's matrices: those of the blocks, by the axes that they contract (layers are a batch
    axis). Embedding, head and norms are left to AdamW (with Nesterov momentum, as Muon itself)."""
    dims = {
        "q_DHK": ((1,), (2, 3)), "k_DGK": ((1,), (2, 3)), "v_DGK": ((1,), (2, 3)),
        "o_HKD": ((1, 2), (3,)), "gate_DF": ((1,), (2,)), "up_DF": ((1,), (2,)),
        "down_FD": ((1,), (2,)),
    }  # fmt: skip
    numbers = {name: optax.contrib.MuonDimensionNumbers(*axes) for name, axes in dims.items()}
    blocks = {name: numbers.get(name) for name in params["blocks"]}
    return {name: blocks if name == "blocks" else None for name in params}
