"""Pictures for benchmarks that have judges of their own: where they lie, that they go on, bad input."""

import json

import numpy as np
import pytest
from PIL import Image

from mmada_jax.measure import drawings
from mmada_jax.programs.evaluate import main
from tests.api_toys import untrained_model  # noqa: F401

TEXTS = ["a handwritten seven", "a three and a five", "a nine"]


def prompts_of(kind, folder):
    """A benchmark's own file, or folder, of prompts."""
    path = folder / "prompts"
    if kind == "geneval":
        lines = [
            {"tag": "counting", "include": [{"class": "seven", "count": 1}], "prompt": t} for t in TEXTS
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "dpg":
        path.mkdir()
        for name, text in zip(("b", "a", "c"), TEXTS, strict=True):
            (path / f"{name}.txt").write_text(text + "\n")
    else:
        path.write_text(json.dumps([{"prompt_id": i + 1, "Prompt": t} for i, t in enumerate(TEXTS)]))
    return path


FILES = {
    "geneval": {f"0000{i}/{name}" for i in range(3) for name in
                ("metadata.jsonl", *(f"samples/000{k}.png" for k in range(4)))},
    "dpg": {"a.png", "b.png", "c.png"},
    "wise": {"1.png", "2.png", "3.png"},
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_pictures_lie_where_the_judge_looks_and_go_on(kind, model, model_workdir, tmp_path, capsys):
    path, out = prompts_of(kind, tmp_path), tmp_path / "out"
    command = ["--model", str(model_workdir), "--draw", kind, "--prompts", str(path), "--out", str(out),
               "--steps", "2", "--seed", "7"]  # fmt: skip
    main(command)
    files = {str(file.relative_to(out)): file for file in out.rglob("*") if file.is_file()}
    assert set(files) == FILES[kind] | {"results.json"}
    report = json.loads(files["results.json"].read_text())
    n = drawings.PER_PROMPT[kind]
    assert (report["prompts"], report["pictures"], report["drawn_now"]) == (3, 3 * n, 3 * n)
    assert str(out) in report["judge"]
    # A picture depends on its prompt's number and the seed alone.
    prompts = drawings.read_prompts(kind, path)
    second = drawings.pictures_of(kind, out, prompts[1])
    want = model.draw([prompts[1].text] * n, seed=[7 + n + k for k in range(n)], steps=2)
    for image, drawing in zip(second, want, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawing.image.convert("RGB")))
    if kind == "geneval":
        assert json.loads(files["00001/metadata.jsonl"].read_text())["prompt"] == TEXTS[1]

    # A prompt that isn't done is drawn again, and nothing else is touched.
    before = {name: file.read_bytes() for name, file in files.items()}
    lost = {"geneval": "00001/metadata.jsonl", "dpg": "b.png", "wise": "2.png"}[kind]
    files[lost].unlink()
    kept = {name: file.stat().st_mtime_ns for name, file in files.items() if name[:5] != lost[:5]}
    main(command)
    assert "drawn_now" in capsys.readouterr().out
    for name, file in files.items():
        if name != "results.json":
            assert file.read_bytes() == before[name]
            assert kept.get(name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
    assert json.loads(files["results.json"].read_text())["drawn_now"] == n
    with pytest.raises(ValueError, match="name another --out"):
        main([*command[:-1], "8"])


def test_the_clip_score_is_that_of_the_reward(model_workdir, tmp_path, monkeypatch):
    from mmada_jax.train.rl.rewards import pictures

    asked = []

    class Score:
        def __init__(self, folder, batch):
            assert (folder, batch) == ("clip", 4)

        def __call__(self, prompts, completions, images, answers):
            asked.extend(prompts)
            assert all(isinstance(image, Image.Image) and image.size == (16, 8) for image in images)
            return np.arange(4.0)

    monkeypatch.setattr(pictures, "ClipScore", Score)
    path, out = prompts_of("dpg", tmp_path), tmp_path / "out"
    main(["--model", str(model_workdir), "--draw", "dpg", "--prompts", str(path), "--out", str(out),
          "--steps", "1", "--limit", "2", "--clip", "clip"])  # fmt: skip
    assert asked == [TEXTS[1]] * 4 + [TEXTS[0]] * 4
    assert json.loads((out / "results.json").read_text())["clip_score"] == 1.5


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("geneval", '{"tag": "x"}\n', "has not the form of geneval's prompts"),
        ("geneval", "no json\n", "has not the form of geneval's prompts"),
        ("geneval", "\n", "holds no prompts"),
        ("wise", '[{"prompt_id": 1}]', "has not the form of wise's prompts"),
        ("wise", '[{"prompt_id": "../1", "Prompt": "x"}]', "can't be the name of one picture"),
        ("wise", '[{"prompt_id": 1, "Prompt": "x"}, {"prompt_id": 1, "Prompt": "y"}]', "can't be the name"),
    ],
)
def test_prompts_of_another_form(kind, text, problem, tmp_path):
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        drawings.read_prompts(kind, path)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="needs --prompts"):
        main(["--model", "nowhere", "--draw", "wise", "--out", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="name the prompts of wise"):
        main(["--model", "nowhere", "--draw", "wise", "--out", str(tmp_path), "--prompts", "none.json"])
