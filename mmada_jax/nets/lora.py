"""Low-rank adapters of the transformer's matrices: W + (alpha / rank) A B, of which A and B are trained
(LoRA, arXiv 2106.09685).

Shape letters beside those of `transformer`: I and O inputs and outputs of a matrix, all heads side by
side; R the rank. Adapters are a plain nested dict, {name of the matrix: {"a_NIR", "b_NRO"}}.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from mmada_jax.nets import int8, transformer
from mmada_jax.ranges import Count, OnlyWith, Range, Ranged

# The names of the matrices in LLaDA's checkpoints, and in params.
MATRICES = {
    "q_proj": "q_DHK", "k_proj": "k_DGK", "v_proj": "v_DGK", "attn_out": "o_HKD",
    "ff_proj": "gate_DF", "up_proj": "up_DF", "ff_out": "down_FD",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraConfig(Ranged):
    """Adapters of `rank` R beside the matrices that `targets` names, joined by +, in all layers; 0 is none.
    `alpha` over `rank` is the factor of A B."""

    rank: Count = 0
    alpha: Annotated[float, Range(0, 1e6, above=True), OnlyWith("rank")] = 16.0
    targets: Annotated[str, OnlyWith("rank")] = "+".join(MATRICES)

    def __post_init__(self):
        super().__post_init__()
        if set(self.matrices) - set(MATRICES) or len(set(self.matrices)) < len(self.matrices):
            known = ", ".join(MATRICES)
            raise ValueError(
                f"targets are {self.targets!r}; it must be some of {known}, each once, joined by +"
            )

    @property
    def matrices(self) -> tuple[str, ...]:
        """The adapted matrices by their names in LLaDA's checkpoints."""
        return tuple(self.targets.split("+"))

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapted matrices in params."""
        return tuple(MATRICES[target] for target in self.matrices)


def sizes(config: transformer.ModelConfig, name: str) -> tuple[int, int]:
    """Inputs and outputs of the matrix of that name in params."""
    inputs = int8.INPUTS[name]
    plain = dataclasses.replace(config, weights="plain")
    shape = transformer.param_shapes(plain)["blocks"][name].shape[1:]
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def check(config: transformer.ModelConfig, lora: LoraConfig) -> None:
    """Raises ValueError for a rank that is more than a matrix can have."""
    for target, name in zip(lora.matrices, lora.names, strict=True):
        most = min(sizes(config, name))
        if lora.rank > most:
            raise ValueError(
                f"lora.rank is {lora.rank}, {target} has {most} rows or columns; choose at most {most}"
            )


def init_adapters(key: jax.Array, config: transformer.ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """Adapters that change nothing yet, float32: A uniform within 1 / sqrt(I), as PEFT has it, B zero."""
    N, R, adapters = config.n_layers, lora.rank, {}
    for number, name in enumerate(lora.names):
        I, O = sizes(config, name)
        limit = I**-0.5
        a_NIR = jax.random.uniform(jax.random.fold_in(key, number), (N, I, R), minval=-limit, maxval=limit)
        adapters[name] = {"a_NIR": a_NIR, "b_NRO": jnp.zeros((N, R, O), jnp.float32)}
    return adapters


def beside(params: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """Params with adapters beside them, as `transformer.hidden_states` reads both."""
    layers = next(iter(adapters.values()))["a_NIR"].shape[0]
    return {**params, "lora": {**adapters, "scale_N": jnp.full(layers, lora.scale, jnp.float32)}}
