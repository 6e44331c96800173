"""The model as lmms-eval asks for one: by itself, and by lmms-eval's own tasks where that is installed."""

import importlib
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tests.api_toys import two_canvases, untrained_model  # noqa: F401

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture(name="pictured")
def module_under_test(monkeypatch):
    """The module; where lmms-eval isn't installed, on a stand-in for the class that it derives from."""
    if not INSTALLED:
        base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(lmms=base))
        monkeypatch.delitem(sys.modules, "mmada_jax.measure.pictured", raising=False)
    yield importlib.import_module("mmada_jax.measure.pictured")
    if not INSTALLED:
        del sys.modules["mmada_jax.measure.pictured"]


@pytest.fixture(name="pictures")
def pictures_of_canvases(canvases):
    return [Image.fromarray(((c[..., 0] + 1) * 127.5).astype(np.uint8)) for c in canvases]


def requests_of(pictures, **settings):
    docs = {
        "task": {"test": [{"pictures": [p]} for p in pictures] + [{"pictures": []}, {"pictures": pictures}]}
    }
    asked = [
        types.SimpleNamespace(
            args=(f"what is {i}?", settings, lambda doc: doc["pictures"], i, "task", "test")
        )
        for i in range(len(docs["task"]["test"]))
    ]
    return docs, asked


def test_answers_about_pictures_are_those_of_the_model(pictured, model, pictures, tmp_path, capsys):
    docs, asked = requests_of(pictures, max_new_tokens=8, until=["\n"])
    named = {"block": 4, "out": str(tmp_path), "batch_size": 8}
    made = pictured.PicturedModel(model, **named)
    made.task_dict = docs
    got = made.generate_until(asked)
    more = {"max_new": 8, "block": 4, "stop": model.vocab.end_turn}
    want = [model.answer(p, f"what is {i}?", **more).text for i, p in enumerate(pictures)]
    want += [
        model.generate("what is 2?", **more).text,
        model.answer(pictures[0], "what is 3?", **more).text,
    ]
    assert got == [text.partition("\n")[0] for text in want]
    assert "1 cases have several pictures" in capsys.readouterr().err
    # It goes on where it was: nothing is asked again.
    again = pictured.PicturedModel(model, **named)
    again._job = None
    assert again.generate_until(asked) == got


def test_drawings_are_saved_and_named(pictured, model, pictures, tmp_path):
    docs, asked = requests_of(pictures)
    made = pictured.PicturedModel(model, mode="draw", steps=2, out=str(tmp_path), batch_size=8)
    made.task_dict = docs
    for i, text in enumerate(made.generate_until(asked)):
        [path] = json.loads(text)["images"]
        want = model.draw(f"what is {i}?", steps=2).image.convert("RGB")
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(want))


def test_what_is_refused(pictured, model):
    with pytest.raises(ValueError, match="mode is 'read'; it must be one of answer, draw"):
        pictured.PicturedModel(model, mode="read")
    with pytest.raises(ValueError, match="out=FOLDER"):
        pictured.PicturedModel(model, mode="draw")
    with pytest.raises(NotImplementedError, match="choose a task that generates"):
        pictured.PicturedModel(model).loglikelihood([])


TASK = """
task: which_digit
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_visual: !function looks.visual
doc_to_text: !function looks.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LOOKS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval==0.7.3")
def test_a_task_of_lmms_eval(model, model_workdir, pictures, tmp_path, monkeypatch):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = []
    for i, picture in enumerate(pictures):
        picture.convert("RGB").save(tmp_path / f"{i}.png")
        said = model.answer(picture.convert("RGB"), "which?", max_new=8, block=8, stop=model.vocab.end_turn)
        rows.append(
            {
                "picture": str(tmp_path / f"{i}.png"),
                "question": "which?",
                "answer": said.text if i else "no",
            }
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "which_digit.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "looks.py").write_text(LOOKS)
    found = simple_evaluate(
        "mmada_jax", f"path={model_workdir},block=8", tasks=["which_digit"], batch_size=8,
        task_manager=TaskManager(include_path=str(tmp_path)), log_samples=False,
    )  # fmt: skip
    assert found["results"]["which_digit"]["exact_match,none"] == 0.5
