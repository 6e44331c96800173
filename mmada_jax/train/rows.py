"""The rows of a run: its sources opened, and compared with the model and with what the run had before.

How records become rows is in `data.pipeline`; placing rows on devices is in `devices.sharding`.
"""

import jax

from mmada_jax import files, storage
from mmada_jax.data import pipeline, sources
from mmada_jax.tokens import layout
from mmada_jax.train.runs import ModelRun, Plan, VQRun, image_tokenizer_path, relative
from mmada_jax.weights import lazy
from mmada_jax.weights.folder import ModelFolder, open_image_tokenizer
from mmada_jax.weights.workdir import DATA, differences, has_step


def open_data(
    run: ModelRun, workdir: storage.Path, what: Plan, images: ModelFolder | None = None
) -> pipeline.Pipeline:
    """The rows of a run, from its sources; see `open_rows`. Raises where those can't be opened, don't fit
    the model, or where the workdir's run had others."""
    rows_of = open_rows(run, workdir, what, "data", run.batch_size, images, run.cond_dropout)
    check_unchanged(run, workdir, rows_of)
    return rows_of


def open_pictures(
    run: VQRun, workdir: storage.Path, key: str, size: int, pixels: tuple[int, int, int]
) -> pipeline.Pictures:
    """Batches of `size` pictures of so many rows, columns and channels, from the sources under
    config.`key`. Raises where those can't be opened, or where the workdir's run had others."""
    data = getattr(run, key)
    opened = pipeline.open_pictures(
        data, str(relative(run.data_root, workdir)) if run.data_root else "", key
    )
    made = pipeline.Pictures({key: data}, {key: opened}, {key: size}, run.seed, pixels)
    if key == "data":
        check_unchanged(run, workdir, made)
    return made


def check_unchanged(run: ModelRun | VQRun, workdir: storage.Path, rows_of: pipeline.Turns) -> None:
    """Raises ValueError if the run of the workdir had other data."""
    known = workdir / DATA
    if has_step(workdir) and known.is_file() and not run.data_may_change:
        changed = list(differences("data", files.read_json(known, dict), rows_of.description))
        if changed:
            changes = "; ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in changed[:5])
            raise ValueError(
                f"{workdir} was trained on other data: {changes}. It can't go on where it was; "
                "restore what was, or say --config.data_may_change=True"
            )


def open_rows(
    run: ModelRun,
    workdir: storage.Path,
    what: Plan,
    key: str,
    size: int,
    images: ModelFolder | None = None,
    cond_dropout: float = 0.0,
) -> pipeline.Pipeline:
    """Batches of `size` rows from the sources under config.`key`.

    `images` is the image tokenizer of the run. Where it isn't given, it is opened if sources hold codes of
    images. Raises ValueError or OSError where sources can't be opened, or hold codes of images that aren't
    those of this run.
    """
    data = getattr(run, key)
    rows = {task: n for task, n in pipeline.rows_per_task(run.mixture, size).items() if n}
    root = str(relative(run.data_root, workdir)) if run.data_root else ""
    opened = pipeline.open_sources(data, tuple(rows), root, key)
    with_codes = {
        f"config.{key}.{task}.{name}": source.info
        for task, of_task in opened.items()
        for name, source in of_task.items()
        if layout.image_start(task, run.max_text) and sources.codes_of(source)
    }
    if with_codes:
        images = images or open_image_tokenizer(image_tokenizer_path(run, workdir))
        sha256 = lazy.sha256(images.tensors())
    for where, info in with_codes.items():
        if what.shape.pixels[:2] != (info.get("image_size"),) * 2:
            raise ValueError(
                f"{where} has the codes of images of {info.get('image_size')} pixels, this run's have "
                f"{what.shape.pixels[0]}x{what.shape.pixels[1]}; change image_size, or prepare it again"
            )
        if info.get("image_tokenizer") != sha256:
            raise ValueError(
                f"{where} has the codes of another image tokenizer (sha256 "
                f"{str(info.get('image_tokenizer'))[:16]}) than {images.path} ({sha256[:16]}); name that "
                "one as image_tokenizer, or prepare it again"
            )
    return pipeline.Pipeline(
        what.tokenizer, what.vocab, data, opened, rows, what.shape, run.seed,
        cond_dropout, run.cut_long, run.think_prompt, run.think_draw_prompt,
    )  # fmt: skip


def say_left_out(rows: pipeline.Turns, key: str = "") -> None:
    """Prints, in the first process, what the sources under config.`key` leave out; those of
    pictures are right under config."""
    for line in pipeline.left_out(rows.opened, key) if jax.process_index() == 0 else ():
        print(line, flush=True)
