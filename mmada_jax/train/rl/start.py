"""What happens before the first iteration: the configuration is checked, prompts, rewards and the model are
opened, and the workdir is prepared. All that doesn't fit is an error here, before any compute."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mmada_jax import config as config_lib
from mmada_jax import nearby, storage
from mmada_jax.devices import sharding
from mmada_jax.devices.distributed import together
from mmada_jax.model.model import Model, open_model
from mmada_jax.nets import lora
from mmada_jax.nets.lora import LoraConfig
from mmada_jax.train.rl.prompts import Prompt, open_prompts
from mmada_jax.train.rl.rewards.functions import Combined
from mmada_jax.train.rl.rollout import prompt_ids, response_span
from mmada_jax.train.rl.run import RLRun, Task
from mmada_jax.train.rl.unigrpo import UniGRPOConfig
from mmada_jax.train.runs import describe_adapter, held_base, relative
from mmada_jax.weights.folder import (
    IMAGE_TOKENIZER,
    ModelFolder,
    describe_model,
    image_tokenizer_of,
    keep_image_tokenizer,
    open_folder,
)
from mmada_jax.weights.quantized import rest_dtype
from mmada_jax.weights.state import all_finite
from mmada_jax.weights.workdir import TOKENIZER, check_workdir, claim_workdir, has_step

# A checkpoint means something only with these groups of the configuration as they were when it was made.
FIXED_GROUPS = ("program", "init", "ahead", "reference_dtype", "objective", "lora", "base_dtype")
ABSENT = {"lora": config_lib.to_dict(LoraConfig()), "base_dtype": "bfloat16"}  # in older versions
# Of the group `objective` only mu (it converts steps to iterations) and kl (it says whether the checkpoint
# holds a reference) have to stay; the other fields may change from one start of a run to the next.
FREE_FIELDS = tuple(
    f"objective.{field.name}"
    for field in dataclasses.fields(UniGRPOConfig)
    if field.name not in ("mu", "kl")
)


def open_run(
    config: Mapping[str, Any], workdir: storage.Name, allow_code: str = ""
) -> tuple[RLRun, jax.sharding.Mesh, dict[str, Sequence[Prompt]], dict[str, Combined]]:
    """The run, its mesh, and the prompts and the rewards of each task by its name. `allow_code` is a file
    of the user's, whose functions are the rewards own:NAME.

    Raises ValueError, OSError or ImportError, naming the task, for whatever is wrong with them.
    """
    run, workdir = config_lib.from_dict(RLRun, config), storage.path(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(run.mesh))
    check_rollout_rows(run, mesh)
    check_same_run(run, workdir)
    nearby.use(run.cache_dir, run.cache_gib)
    prompts, rewards = {}, {}
    for name, task in run.tasks.items():
        try:
            settings = _reward_settings(task, workdir, allow_code)
            rewards[name] = Combined(task.rewards, settings, task.reward_limit)
            prompts[name] = open_prompts(task.data, relative(run.data_root, workdir))
        except (ValueError, OSError, ImportError) as error:
            # One of the three: subclasses such as UnicodeDecodeError can't be made of a text.
            kind = next(kind for kind in (ValueError, OSError, ImportError) if isinstance(error, kind))
            raise kind(f"config.tasks.{name}: {error}") from error
    return run, mesh, prompts, rewards


def _reward_settings(task: Task, workdir: storage.Path, allow_code: str) -> dict[str, dict[str, Any]]:
    """The settings of a task's rewards, with the paths in `folder` relative to the workdir, and the file
    that is allowed in the settings of the user's own ones. Raises ValueError if a configuration names that
    file: it would run code."""
    found = {
        reward: {
            key: str(relative(value, workdir)) if key == "folder" else value
            for key, value in settings.items()
        }
        for reward, settings in task.reward_settings.items()
    }
    for reward in (reward for reward in task.rewards if reward.startswith("own:")):
        of = found.setdefault(reward, {})
        if "file" in of:
            raise ValueError(
                f"reward_settings of {reward!r} name the file {of['file']!r}; code is allowed on the "
                "command line alone: leave it out, and say --allow_code FILE.py"
            )
        of["file"] = allow_code
    return found


def check_same_run(run: RLRun, workdir: storage.Path) -> None:
    """Raises ValueError if the workdir belongs to another run."""
    fixed, free = FIXED_GROUPS, FREE_FIELDS
    if run.ahead:
        # A checkpoint holds the rollout in flight, made for its prompts and scored under its masks.
        fixed, free = (*FIXED_GROUPS, "tasks", "seed"), ()
    if (workdir / IMAGE_TOKENIZER).is_dir():
        fixed += ("image_tokenizer",)
    check_workdir(workdir, config_lib.to_dict(run), fixed, free, ABSENT)


def check_rollout_rows(run: RLRun, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if the rows of a rollout or of an update can't be spread over the devices."""
    shards, G = sharding.row_parts(mesh), run.objective.responses
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


def load_policy(
    run: RLRun, workdir: storage.Path, mesh: jax.sharding.Mesh
) -> tuple[Model, Any, ModelFolder | None]:
    """The model without its params, the float32 params on the mesh that the run starts from, and the
    model's image tokenizer, None for a model of text alone.

    A run that goes on reads its own workdir and nothing of `init`; its params, None here, are in its
    checkpoint. A run of adapters gets the params that they stand beside, whenever it starts, in
    `base_dtype`. All processes call this, because what is opened is verified by all together. Raises
    FileNotFoundError or ValueError if there is no such model.
    """
    if not run.init:
        raise ValueError("config.init is empty; name the workdir of a model, as that of configs/cot.py")
    resumed, vision, params = has_step(workdir), None, None
    reads = not resumed or run.lora.rank > 0
    source = open_folder(relative(run.init, workdir) if reads else workdir, weights=reads)
    if run.image_tokenizer:
        vision = relative(run.image_tokenizer, workdir)
    if resumed and (workdir / IMAGE_TOKENIZER).is_dir():
        vision = workdir / IMAGE_TOKENIZER if reads else None
    images = image_tokenizer_of(source, vision)
    model, dtype = open_model(source, mesh, "float32", images=images), "float32"
    if run.lora.rank:
        lora.check(model.config, run.lora)
        model = dataclasses.replace(model, config=held_base(model.config, run.base_dtype))
        dtype = rest_dtype(run.base_dtype)
    if reads:
        params = model.place(source.params, dtype)
        if not all_finite(params):
            raise ValueError(f"config.init: the params in {run.init} are not finite; name others")
    config = dataclasses.replace(model.config, **run.model)
    return dataclasses.replace(model, config=config), params, images


def write_workdir(run: RLRun, workdir: storage.Path, model: Model, images: ModelFolder | None) -> None:
    """Writes what the workdir holds of the run and of its model beside the steps. All processes call this,
    and the first one writes."""
    if images:
        keep_image_tokenizer(workdir, images)
    generation, draws = model.defaults.values(), images is not None
    about = describe_model(model.config, model.vocab, model.grid, model.max_text, generation, draws)
    if run.lora.rank:
        base = open_folder(relative(run.init, workdir))
        about["adapter"] = describe_adapter(run.lora, base, workdir)
    with together("writing to the workdir"):
        claim_workdir(workdir, config_lib.to_dict(run), {TOKENIZER: model.tokenizer.to_json()}, about)
