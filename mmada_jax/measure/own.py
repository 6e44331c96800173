"""What a model of one's own data is worth, on records that it hasn't seen. Pictures that have names, as in
a folder for each class, are named, drawn by their names, and their lower half is redrawn. Questions about
pictures are answered.

Whether a drawing shows what was asked for is decided by a judge that has nothing to do with our models:
scikit-learn's support vector machine on the pixels, fitted on training pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmada_jax.data import images, sources
from mmada_jax.measure.digits import Count
from mmada_jax.measure.held_out import grid
from mmada_jax.serve.api import MMaDA


class Named(NamedTuple):
    """Pictures [n, I, J, C] in [-1, 1], and the name of each."""

    pixels_BIJC: np.ndarray
    names: Sequence[str]


def some(source: sources.Source, model: MMaDA, n: int, seed: int = 0, how: images.Resize = "crop") -> Named:
    """`n` pictures of a source in a random order, or all of them if there are fewer, at the size of the
    model; `how` they were resized in training. Raises ValueError for a record that can't be read."""
    taken = [source[int(index)] for index in np.random.default_rng([seed, 5]).permutation(len(source))[:n]]
    size, channels = model.image_size, model.vq_config.pixel_channels
    pixels = [images.to_pixels(record.image, size, channels, how) for record in taken]
    return Named(np.stack(pixels), [record.texts[0] for record in taken])


class Judge:
    """Reads the name of a picture: a support vector machine on its pixels."""

    def __init__(self, train: Named):
        from sklearn.svm import SVC

        self._svc = SVC(C=10.0).fit(_flat(train.pixels_BIJC), np.array(train.names))

    def __call__(self, pixels_BIJC: np.ndarray) -> np.ndarray:
        """The names [B]."""
        return self._svc.predict(_flat(np.clip(pixels_BIJC, -1, 1)))


def name_pictures(model: MMaDA, test: Named, judge: Judge) -> dict[str, Count]:
    """How many pictures the model names rightly, asked in its default words; how many the judge does."""
    most = 1 + max(len(model.tokenizer.encode(name)) for name in set(test.names))
    said = model.answer(list(test.pixels_BIJC), max_new=most, block=most)
    by_judge = _count(judge(test.pixels_BIJC), test.names)
    return {"named": _count([text.text for text in said], test.names), "named_by_judge": by_judge}


def draw_names(
    model: MMaDA, names: Sequence[str], each: int, judge: Judge, seed: int = 0
) -> tuple[Count, np.ndarray]:
    """How many drawings the judge reads as their names, `each` of every name; the pixels of all."""
    wanted = [name for name in names for _ in range(each)]
    drawn = model.draw(wanted, seed=seed)
    pixels_BIJC = model.decode(np.stack([drawing.codes for drawing in drawn]))
    return _count(judge(pixels_BIJC), wanted), pixels_BIJC


def redraw_halves(
    model: MMaDA, test: Named, judge: Judge, seed: int = 0
) -> tuple[dict[str, Count], np.ndarray]:
    """How many pictures the judge reads rightly after their lower half was redrawn by name; how many of
    them it reads with that half grey; the pixels."""
    masks_BIJ = np.zeros(test.pixels_BIJC.shape[:3], bool)
    masks_BIJ[:, masks_BIJ.shape[1] // 2 :] = True
    drawn = model.inpaint(list(test.pixels_BIJC), list(masks_BIJ), list(test.names), seed=seed)
    pixels_BIJC = model.decode(np.stack([drawing.codes for drawing in drawn]))
    grey_BIJC = np.where(masks_BIJ[..., None], np.float32(0), test.pixels_BIJC)
    counts = {
        "redrawn": _count(judge(pixels_BIJC), test.names),
        "half_grey": _count(judge(grey_BIJC), test.names),
    }
    return counts, pixels_BIJC


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows of as many pictures each as one picture."""
    return grid(np.concatenate(list(rows)), len(rows[0]))


def measure(
    model: MMaDA,
    train: sources.Source,
    test: sources.Source,
    n: int,
    each: int,
    seed: int = 0,
    how: images.Resize = "crop",
) -> tuple[Mapping[str, Count], Image.Image]:
    """All of it on `n` test pictures and `each` drawings of every name, with a judge fitted on 10,000
    training pictures; and a sheet with eight drawings of each name."""
    known, cases = (some(of, model, most, seed, how) for of, most in ((train, 10_000), (test, n)))
    names, judge = sorted(set(known.names)), Judge(known)
    counts: dict[str, Any] = name_pictures(model, cases, judge)
    counts["drawn"], drawn_BIJC = draw_names(model, names, each, judge, seed)
    few = Named(cases.pixels_BIJC[: each * len(names)], cases.names[: each * len(names)])
    redrawn, _ = redraw_halves(model, few, judge, seed)
    by_name = drawn_BIJC.reshape(len(names), each, *drawn_BIJC.shape[1:])
    return counts | redrawn, sheet([of_name[:8] for of_name in by_name])


def answer_questions(
    model: MMaDA, source: sources.Source, n: int, seed: int = 0, how: images.Resize = "crop"
) -> dict[str, Count]:
    """How many of the first questions of `n` conversations about pictures are answered letter by letter as
    they are there, by question; "all" are all of them. Questions that are asked fewer than ten times are
    counted there alone. Raises ValueError for a record without a picture or without an answer."""
    chosen = np.sort(np.random.default_rng([seed, 5]).permutation(len(source))[:n])
    pictures, questions, wanted = [], [], []
    for index in chosen:
        record = source[int(index)]
        if record.image is None or len(record.turns) < 2:
            raise ValueError(
                f"record {record.key!r} isn't a question about a picture with its answer; name such records"
            )
        pixels = images.to_pixels(record.image, model.image_size, model.vq_config.pixel_channels, how)
        pictures.append(pixels)
        questions.append(record.turns[0]["content"])
        wanted.append(record.turns[1]["content"])
    most = 1 + max(len(model.tokenizer.encode(answer)) for answer in set(wanted))
    said = [text.text for text in model.answer(pictures, questions, max_new=most, block=most)]
    by_question: dict[str, list[tuple[str, str]]] = {}
    for question, pair in zip(questions, zip(said, wanted, strict=True), strict=True):
        by_question.setdefault(question, []).append(pair)
    often = {name: pairs for name, pairs in sorted(by_question.items()) if len(pairs) >= 10}
    counts = {name: _count(*zip(*pairs, strict=True)) for name, pairs in often.items()}
    return counts | {"all": _count(said, wanted)}


def _flat(pixels_BIJC: Any) -> np.ndarray:
    return np.asarray(pixels_BIJC).reshape(len(pixels_BIJC), -1)


def _count(said: Sequence[str], wanted: Sequence[str]) -> Count:
    right_B = np.asarray(said, object) == np.asarray(wanted, object)
    return Count(int(right_B.sum()), len(right_B))
