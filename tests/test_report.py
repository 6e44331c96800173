"""The report: one file that holds all its pictures, whatever a model has written; intervals of shares."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from mmada_jax.data import digits
from mmada_jax.measure import report

HOSTILE = "<script>alert('x')</script> \" ' & {{ 7 * 7 }} <img src=x onerror=alert(1)>"
STEPS = 12


def canvases(n, k):
    scans = digits.load("test")
    which = np.arange(n * k).reshape(n, k) % len(scans.labels)
    return np.stack([digits.canvas(*scans.pixels[row]) for row in which]), scans.labels[which]


def measured(said="<think>1+2=3 3+3=6</think>6", want="6"):
    """(result, pictures, histories) of a run that draws as people do, and says this."""
    count = {"correct": 31, "total": 40}
    stages = {
        "tokenizer": {"reconstructed_digit": count, "psnr_db": 18.2},
        "pretrain": dict.fromkeys(("vqa_one", "vqa_two", "t2i_one", "t2i_two", "inpaint"), count),
        "cot_before": {"text_cot": {"correct": 0, "total": 40}},
        "cot": dict.fromkeys(("vqa_sum", "text_cot", "r2i_thought", "r2i_image", "t2i_one"), count),
    }
    sampled = dict.fromkeys(("text_cot", "text_cot_sampled", "t2i_one_unguided"), count)
    stages |= {
        name: sampled | {"rewards": {"arithmetic": reward, "drawing": 0.5}}
        for name, reward in (("unigrpo_before", 1.25), ("unigrpo", 1.75))
    }
    result = {
        "judge": count, "stages": stages, "data_wait": 0.01,
        "seconds": {"pretrain": 100.0, "unigrpo": 81.0},
    }  # fmt: skip
    (one, of_one), (two, of_two) = canvases(10, 1), canvases(40, 2)
    masks = np.zeros((40, digits.HEIGHT, digits.WIDTH), bool)
    masks[:, :, digits.SIDE :] = True
    shown = two[: len(report.SHOWN)]
    # Revealed column by column.
    drawing = [
        np.where(np.arange(digits.WIDTH)[None, None, :, None] <= 16 * i / (STEPS - 1), shown, 0)
        for i in range(STEPS)
    ]
    pictures = {
        "rebuilt": one, "image_steps": drawing, "text_steps": ["▁▁▁", "a ▁▁", said],
        "drawn_one": (one, of_one), "drawn_two": (two, of_two),
        "read_one": [(p, said, want) for p in one[:6]], "read_two": [(p, said, want) for p in two[:10]],
        "inpaint": {"canvases": two, "masks": masks, "pixels": two, "labels": of_two},
        "arithmetic": [("3+4", said, want)] * 12,
        "before": {"text_cot": [("1+2+3", said, want)] * 4},
        "after": {
            "text_cot": [("1+2+3", said, want)] * 12,
            "vqa_sum": [(p, said, want) for p in two[:16]],
            "r2i": (one, [("draw 3+4", said)] * 10),
        },
        "rl_before": {"sums": [("1+1", "3", "2"), ("2+2", "4", "4")], "drawn": (one, of_one)},
        "rl_after": {"sums": [("1+1", said, "2"), ("2+2", "4", "4")], "drawn": (one, of_one)},
    }  # fmt: skip
    rows = [{"step": i, "loss_t2i": 3 / i, "loss_mmu": 2 / i} for i in range(1, 9)]
    rewards = [{"step": i, f"{('arithmetic', 'drawing')[i % 2]}/reward": i / 9} for i in range(1, 9)]
    histories = {
        "image_tokenizer": [{"step": i, "reconstruction": 1 / i} for i in range(1, 9)],
        "pretrain": rows, "cot": rows, "unigrpo": rewards,
    }  # fmt: skip
    return result, pictures, histories


def page_of(said):
    """The page of a model that says this, without charts."""
    result, pictures, _ = measured(said)
    return report.page(result, pictures, [])


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes, ids of sections, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.sections, self.images, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "section":
            self.sections.append(dict(attrs)["id"])
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    result, pictures, histories = measured()
    return report.page(result, pictures, report.curves(histories))


def test_the_page_has_all_stages_and_holds_its_pictures(page):
    read = Reader(page)
    assert read.sections == [
        "denoising", "drawn", "inpainted", "read", "thinking", "rewards", "numbers", "steps", "tokenizer",
        "curves",
    ]  # fmt: skip
    assert len(read.images) > 60
    for image in read.images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
        assert image["alt"].strip()
    for name, (what, *_) in report.METRICS.items():
        assert (what in read.text) == (name != "text_arithmetic")  # which wasn't measured here
    assert "31/40" in read.text and "78 %" in read.text and "62 – 88 %" in read.text
    assert "arithmetic 1.25 → 1.75" in " ".join(read.text.split())
    assert "in 3 minutes" in read.text


def test_the_page_asks_nothing_of_a_network_and_fits_in_a_mail(page):
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"data:image/png;base64,[\w+/=]+", "", page))
    assert not {"script", "link", "iframe", "object", "embed"} & set(Reader(page).tags)
    assert "url(" not in page and "@import" not in page
    assert len(page) < 1_000_000


def test_what_a_model_writes_stays_text():
    plain, hostile = Reader(page_of("6")), Reader(page_of(HOSTILE))
    assert "script" not in hostile.tags
    assert len(hostile.images) == len(plain.images)
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) > 20


def test_an_animation_goes_from_hidden_to_drawn():
    _, pictures, _ = measured()
    drawn = report.tiles(pictures)["animated"]
    assert [tile["text"] for tile in drawn] == list(report.SHOWN)
    for i, tile in enumerate(drawn):
        with Image.open(io.BytesIO(base64.b64decode(tile["src"].partition(",")[2]))) as image:
            assert (image.size, image.n_frames) == ((digits.WIDTH, digits.HEIGHT), STEPS)
            for step in range(STEPS):
                image.seek(step)
                want = report.to_uint8(pictures["image_steps"][step][i])[..., 0]
                np.testing.assert_array_equal(np.asarray(image.convert("L")), want)


def test_right_and_wrong_answers_are_told_apart():
    right, wrong = page_of("<think>2+4=6</think>6"), page_of("<think>2+4=5</think>5")
    assert right.count('class="right"') > 10
    assert wrong.count('class="wrong"') > right.count('class="wrong"') + 10


def test_the_interval_is_wilson_s():
    from scipy.stats import binomtest

    for correct, total in ((0, 10), (10, 10), (31, 40), (199, 200), (1, 1)):
        want = binomtest(correct, total).proportion_ci(method="wilson")
        np.testing.assert_allclose(report.wilson(correct, total), want, atol=1e-4)


def test_the_picture_of_the_readme_has_five_rows_of_ten():
    _, pictures, _ = measured()
    image = report.results(pictures)
    assert image.size == (5 * 10 * (digits.WIDTH + 2), 5 * 5 * (digits.HEIGHT + 2))
