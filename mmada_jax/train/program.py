"""What the loop of training needs to know of a run: an objective, its rows, what is shown.

The programs themselves are made in `train.supervised` (the model) and `train.pictures` (the image
tokenizer).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mmada_jax.data import pipeline
from mmada_jax.tokens.tokenizer import TextTokenizer
from mmada_jax.train.metrics import Metrics
from mmada_jax.weights.folder import ModelFolder
from mmada_jax.weights.workdir import DATA, TOKENIZER


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained: params, and their loss on rows that `prepare` makes of a batch.

    `loss` must be a sum over rows: where a batch goes through the model in parts, the gradients of the
    parts are added.
    """

    init_params: Callable[[jax.Array], Any]
    axes: Any  # logical axis names of the params, None: replicated
    prepare: Callable[[jax.Array, Any, Any], Any]  # (key of the step, batch, step) -> rows
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]  # (params, rows)
    # What is trained, and what stands beside it and isn't -> the params of `loss`.
    join: Callable[..., Any] = lambda params: params


@dataclasses.dataclass(frozen=True)
class Program:
    """What the loop of `train` needs to know of a run.

    `load` gives those rows of a step that lie on the devices of this process. `encode` takes rows placed
    on the devices and gives the batch that the objective prepares. `images` is the image tokenizer of a
    model's run. `start` are the params to begin with, as Lazy arrays, None for random ones. `frozen` are
    params that aren't trained, Lazy arrays with the logical axes `frozen_axes` (None: replicated), and are
    held as they are.
    `average` is that of `optim.averaged`, 0 for none. `evaluate` takes what is trained and what isn't, in
    a list, the step and the metrics; it gives values and shows samples in the metrics. `remark` takes a
    row of metrics and says what is wrong with it, if anything is. `data` describes the data; a resumed run
    compares it with what it had before. `from_bucket` says whether records are read from a bucket.
    """

    objective: Objective
    load: Callable[[int, Sequence[int]], pipeline.Loaded]
    encode: Callable[[Any], Any]
    tokens_per_step: int
    flops_per_step: Callable[[Mapping[str, float]], float] | int = 0  # from a step's values; 0: unknown
    tokenizer: TextTokenizer | None = None
    images: ModelFolder | None = None
    accumulate: int = 1
    start: Any = None
    frozen: Any = None
    frozen_axes: Any = None
    average: float = 0.0
    evaluate: Callable[[Any, int, Metrics], dict[str, float]] | None = None
    remark: Callable[[Mapping[str, float]], str | None] = lambda values: None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    from_bucket: bool = False

    @property
    def texts(self) -> dict[str, str]:
        """The files that a workdir keeps of a run, by name."""
        texts = {DATA: json.dumps(self.data, indent=1)} if self.data else {}
        return texts | ({TOKENIZER: self.tokenizer.to_json()} if self.tokenizer else {})
