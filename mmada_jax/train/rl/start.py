"""What happens before the first iteration: the configuration is checked, prompts, rewards and the model are
opened, and the workdir is prepared. All that doesn't fit is an error here, before any compute."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmada_jax import config as config_lib
from mmada_jax.devices import sharding
from mmada_jax.model.model import Model, open_model
from mmada_jax.train.rl.prompts import Prompt, open_prompts
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rollout import prompt_ids, response_span
from mmada_jax.train.rl.run import RLRun, Task
from mmada_jax.train.rl.unigrpo import UniGRPOConfig
from mmada_jax.train.runs import relative
from mmada_jax.weights import lazy, llada_keys, magvit_keys
from mmada_jax.weights.folder import IMAGE_TOKENIZER, open_folder, write_image_tokenizer
from mmada_jax.weights.state import all_finite
from mmada_jax.weights.workdir import check_workdir, has_step, read_config

# A checkpoint means something only with these groups of the configuration as they were when it was made.
FIXED_GROUPS = ("program", "init", "ahead", "reference_dtype", "objective")
# Of the group `objective` only mu (it converts steps to iterations) and kl (it says whether the checkpoint
# holds a reference) have to stay; the other fields may change from one start of a run to the next.
FREE_FIELDS = tuple(
    f"objective.{field.name}"
    for field in dataclasses.fields(UniGRPOConfig)
    if field.name not in ("mu", "kl")
)
# Fields of the transformer's configuration that config.json keeps beside the architecture, with the values
# of the model in `init`.
KEPT_COMPUTATION = ("attention", "pad", "remat", "unroll")


def open_run(
    config: Mapping[str, Any], workdir: str | pathlib.Path
) -> tuple[RLRun, jax.sharding.Mesh, dict[str, Sequence[Prompt]], dict[str, Combined]]:
    """The run, its mesh, and the prompts and the rewards of each task by its name.

    Raises ValueError, OSError or ImportError, naming the task, for whatever is wrong with them.
    """
    run, workdir = config_lib.from_dict(RLRun, config), pathlib.Path(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    check_rollout_rows(run, mesh)
    check_same_run(run, workdir)
    prompts, rewards = {}, {}
    for name, task in run.tasks.items():
        try:
            rewards[name] = Combined(task.rewards, _reward_settings(task, workdir), task.reward_limit)
            prompts[name] = open_prompts(task.data, relative(run.data_root, workdir))
        except (ValueError, OSError, ImportError) as error:
            # One of the three: subclasses such as UnicodeDecodeError can't be made of a text.
            kind = next(kind for kind in (ValueError, OSError, ImportError) if isinstance(error, kind))
            raise kind(f"config.tasks.{name}: {error}") from error
    return run, mesh, prompts, rewards


def _reward_settings(task: Task, workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The settings of a task's rewards, with the paths in `folder` relative to the workdir."""
    return {
        reward: {
            key: str(relative(value, workdir)) if key == "folder" else value
            for key, value in settings.items()
        }
        for reward, settings in task.reward_settings.items()
    }


def check_same_run(run: RLRun, workdir: pathlib.Path) -> None:
    """Raises ValueError if the workdir belongs to another run."""
    fixed, free = FIXED_GROUPS, FREE_FIELDS
    if run.ahead:
        # A checkpoint holds the rollout in flight, made for its prompts and scored under its masks.
        fixed, free = (*FIXED_GROUPS, "tasks", "seed"), ()
    if (workdir / IMAGE_TOKENIZER).is_dir():
        fixed += ("image_tokenizer",)
    check_workdir(workdir, config_lib.to_dict(run), fixed, free)


def check_rollout_rows(run: RLRun, mesh: jax.sharding.Mesh) -> None:
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


def check_tasks(
    run: RLRun,
    model: Model,
    prompts: Mapping[str, Sequence[Prompt]],
    rewards: Mapping[str, Combined],
) -> None:
    """Raises ValueError, naming the task, if its rules, prompts or rewards don't fit the model."""
    for name, task in run.tasks.items():
        try:
            if task.layout != "lm_chat" and model.vision is None:
                raise ValueError(
                    f"layout {task.layout} needs an image tokenizer; name it in config.image_tokenizer"
                )
            at = response_span(task, model.vocab, model.rows)
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
                # Black images for all prompts, which take no memory.
                size = (*model.image_size, model.vision.config.pixel_channels)
                images = np.broadcast_to(np.float32(0), (len(prompts[name]), *size))
            texts, answers = ([getattr(p, field) for p in prompts[name]] for field in ("text", "answer"))
            rewards[name].check(texts, answers, images)
        except ValueError as error:
            raise ValueError(f"config.tasks.{name}: {error}") from error


def load_policy(run: RLRun, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> tuple[Model, Any]:
    """The model without its params, and the float32 params on the mesh that the run starts from.

    A run that goes on reads its own workdir and nothing of `init`; its params, None here, are in its
    checkpoint. Raises FileNotFoundError or ValueError if there is no such model.
    """
    if not run.init:
        raise ValueError("config.init is empty; name the workdir of a model, as that of configs/cot.py")
    vision = relative(run.image_tokenizer, workdir) if run.image_tokenizer else None
    computed = read_config(workdir).get("computed") if has_step(workdir) else None
    if computed is None:  # a new run, or one of an older version, whose config.json lacks it
        source = open_folder(relative(run.init, workdir))
        model = open_model(source, mesh, "float32", image_tokenizer=vision)
        params, computed = model.place(source.params, "float32"), {}
        if not all_finite(params):
            raise ValueError(f"config.init: the params in {run.init} are not finite; name others")
    else:
        model, params = open_model(open_folder(workdir, weights=False), mesh, "float32"), None
    config = dataclasses.replace(model.config, **computed | run.model)
    return dataclasses.replace(model, config=config), params


def workdir_config(run: RLRun, model: Model) -> dict[str, Any]:
    """The content of the workdir's config.json: the run, the architecture in the words of a checkpoint, how
    the model is computed, and its rules of generation."""
    values = llada_keys.config_to_hf(model.config, model.vocab, model.grid, model.max_text)
    return config_lib.to_dict(run) | {
        "architecture": values | {"dtype": model.config.dtype},
        "computed": {name: getattr(model.config, name) for name in KEPT_COMPUTATION},
        "generation": model.defaults.values(),
    }


def keep_image_tokenizer(workdir: pathlib.Path, model: Model) -> None:
    """Copies the image tokenizer into the workdir, so that the workdir needs nothing of `init` any more.
    The first process does it."""
    vision, path = model.vision, workdir / IMAGE_TOKENIZER
    if jax.process_index() == 0 and vision and not path.exists():
        values = magvit_keys.config_to_hf(vision.config) | {"dtype": "float32"}
        write_image_tokenizer(path, values, lazy.lazy(jax.device_get(vision.params)))
