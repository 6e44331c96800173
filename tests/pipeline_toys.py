"""Records in lists, for the tests of how they become rows."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from mmada_jax.data import sources
from mmada_jax.data.pipeline import Pipeline, Shape, rows_per_task
from mmada_jax.data.records import Record
from mmada_jax.tokens.tokenizer import TextTokenizer, chat

MIXTURE = {"t2i": 3, "lm": 1, "lm_chat": 2, "mmu": 4}
SIDE, N_IMAGE, MAX_TEXT, CODES = 32, 4, 48, 64
SHAPE = Shape(MAX_TEXT, N_IMAGE, (SIDE, SIDE, 3))


@dataclasses.dataclass(frozen=True)
class Listed:
    """A source of records in a list; an exception among them is raised."""

    items: list
    fingerprint: str = "0"
    info: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def png(shade, side=SIDE):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def with_codes(name, n):
    codes = [np.full(N_IMAGE, i % CODES) for i in range(n)]
    return Listed(
        [Record(f"{name}{i}", codes=codes[i], texts=(f"{name} {i}",)) for i in range(n)],
        info={"codes": N_IMAGE},
    )


def texts(name, n):
    return Listed([Record(f"{name}{i}", texts=(f"{name} {i}",)) for i in range(n)])


def dialogues(n, ask="q", codes=False):
    turns = [
        ({"role": "user", "content": f"{ask} {i}"}, {"role": "assistant", "content": f"a {i}"})
        for i in range(n)
    ]
    image = [np.full(N_IMAGE, i) if codes else None for i in range(n)]
    items = [Record(f"r{i}", turns=turns[i], codes=image[i]) for i in range(n)]
    return Listed(items, info={"codes": N_IMAGE if codes else 0})


@pytest.fixture(scope="module", name="tokenizer")
def bytes_tokenizer():
    return TextTokenizer.train(["a caption of words", chat("q 1", "a 1")], 320)


def make(tokenizer, opened, mixture=None, size=20, weights=None, **options):
    mixture = mixture or {task: MIXTURE.get(task, 1) for task in opened}
    data = {
        task: {name: sources.SourceConfig(weight=(weights or {}).get(name, 1.0)) for name in of_task}
        for task, of_task in opened.items()
    }
    options = {"seed": 0, "cond_dropout": 0.0} | options
    return Pipeline(
        tokenizer, tokenizer.vocab(CODES), data, opened, rows_per_task(mixture, size), SHAPE, **options
    )


def all_tasks(tokenizer, **options):
    opened = {
        "t2i": {"a": with_codes("a", 30), "b": with_codes("b", 7)},
        "lm": {"c": texts("c", 9)},
        "lm_chat": {"d": dialogues(11)},
        "mmu": {"e": dialogues(13, codes=True)},
    }
    return make(tokenizer, opened, **options)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, tuple(a.rows), tuple(b.rows))
