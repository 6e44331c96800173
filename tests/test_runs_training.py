"""Runs on files of one's own: what can't be used, kills, evaluation, devices, other data."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import ROOT, xla_flags
from PIL import Image
from programs import Program

from mmada_jax.devices import sharding
from mmada_jax.train import metrics, optim
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import make_step, model_program, train
from mmada_jax.weights.state import init_state, state_shardings
from tests.run_files import SIZE, STEPS, N, changed, config_of_files, own_files  # noqa: F401


@pytest.fixture(scope="module")
def launch(config, files, tmp_path_factory):
    """launch/train.py as a user runs it, on one device, with a config file of the user's own."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "values.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.load(open({str(folder / 'values.json')!r})))\n"
    )

    def start(workdir, *flags):
        command = [ROOT / "launch/train.py", "--config", folder / "own.py", "--workdir", workdir, *flags]
        return Program(command, {"XLA_FLAGS": xla_flags(1)})

    return start


def finish(process):
    out = process.communicate()[0]
    return process.returncode, out


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """The workdir of a run over all the files, and what it printed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    code, out = finish(launch(workdir))
    assert code == 0, out
    return workdir, out


def rows(workdir):
    return metrics.read(workdir / "metrics.jsonl")


def losses(workdir):
    return {row["step"]: {k: v for k, v in row.items() if k.startswith("loss")} for row in rows(workdir)}


def test_what_can_not_be_used_is_counted_and_training_goes_on(trained):
    workdir, out = trained
    last = rows(workdir)[-1]
    assert last["step"] == STEPS
    # Each of the N records had its turn once; what took the place of a bad one may have been bad too.
    counts = {name: n for name, n in last.items() if name.startswith("skipped ")}
    of_files = ("t2i.pictures: unreadable", "mmu.pictures: unreadable", "lm_chat.talks: too long")
    assert counts.keys() == {f"skipped {name}" for name in of_files}
    assert all(1 <= n <= 3 for n in counts.values()), counts
    for name in counts:
        assert name in out
    assert all(np.isfinite(row[f"loss_{task}"]) for row in rows(workdir) for task in ("t2i", "mmu", "lm"))


def test_a_run_on_files_that_is_killed_goes_on_where_it_was(launch, trained, tmp_path):
    with launch(tmp_path / "run") as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    code, out = finish(launch(tmp_path / "run", "--config.load_workers=1"))
    assert code == 0, out
    assert "resuming at step" in out
    assert losses(tmp_path / "run") == losses(trained[0])


def test_an_evaluation_measures_and_saves_samples_and_changes_nothing(launch, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / f"run/checkpoints/{STEPS}")
    code, out = finish(launch(tmp_path / "run", "--config.eval_every=3"))
    assert code == 0, out
    assert losses(tmp_path / "run") == losses(trained[0])
    last = rows(tmp_path / "run")[-1]
    for task in ("t2i", "lm", "lm_chat", "mmu"):
        assert 0 < last[f"held_out_{task}_0.85"] < 20
    assert {last["exact_lm_chat"], last["exact_mmu"]} <= {0, 0.5, 1}
    samples = tmp_path / "run/samples"
    assert sorted(p.name for p in samples.iterdir()) == [f"{STEPS:08}.md", f"{STEPS:08}.png"]
    with Image.open(samples / f"{STEPS:08}.png") as image:
        assert (image.mode, image.size) == ("RGB", (2 * (SIZE + 2), SIZE + 2))
    said = (samples / f"{STEPS:08}.md").read_text().splitlines()
    assert [line.split(":")[0] for line in said] == ["- lm_chat"] * 2 + ["- mmu"] * 2 + ["- t2i"] * 2
    assert all("picture" in line for line in said[-2:])


def test_devices_change_neither_batches_nor_losses(config, tmp_path):
    adamw = {"optim.name": "adamw", "optim.eps": 1e-3}  # no sign(0) to amplify noise
    parsed = parse(changed(config, adamw))
    seen = []
    for devices in (1, 4):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        program, optimizer = model_program(parsed, tmp_path, mesh), optim.make(parsed.optim, parsed.steps)
        objective = program.objective
        _, shardings = state_shardings(mesh, objective.init_params, objective.axes, optimizer)
        with jax.set_mesh(mesh):
            state = init_state(jax.random.key(0), objective.init_params, optimizer, shardings)
            step_fn = make_step(objective, optimizer, mesh, shardings)
            for step in range(parsed.steps):
                batch = program.encode(sharding.put_batch(mesh, program.load(step, range(8)).rows))
                tokens_BL = jax.device_get(batch.tokens)
                state, values = step_fn(state, jax.random.key(0), batch)
                seen.append((devices, step, tokens_BL, float(values["loss"])))
    for (_, _, tokens_BL, loss), (_, _, others_BL, other) in zip(seen[:STEPS], seen[STEPS:], strict=True):
        np.testing.assert_array_equal(tokens_BL, others_BL)
        np.testing.assert_allclose(other, loss, rtol=1e-5)


OTHER_DATA = {
    "mixture": ({"mixture.lm": 3}, r"data.rows.lm was 2 and is 4"),
    "batch": ({"batch_size": 16}, r"data.rows.lm was 2 and is 4"),
    "source": ({"data.t2i.pictures.path": "huge.tar"}, r"data.sources.t2i.pictures.fingerprint was "),
    "weight": ({"data.lm.texts.weight": 2.0}, r"data.sources.lm.texts.weight was 1.0 and is 2.0"),
    "seed": ({"seed": 1}, r"data.seed was 0 and is 1"),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_a_run_goes_on_with_other_data_only_if_told_so(config, trained, name, tmp_path):
    changes, message = OTHER_DATA[name]
    shutil.copytree(trained[0], tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=f"was trained on other data: .*{message}"):
        train(changed(config, changes), tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    if name == "source":
        state = train(changed(config, changes) | {"data_may_change": True}, tmp_path / "run")
        assert int(state.step) == STEPS
        train(changed(config, changes), tmp_path / "run")  # these are its data now


def test_data_that_moved_are_the_same(config, trained, files, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.copytree(files / "data", tmp_path / "moved")
    assert int(train(config | {"data_root": "../moved"}, tmp_path / "run").step) == STEPS


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.t2i.pictures.path=nowhere.tar", "nowhere.tar doesn't exist"),
        ("--config.data.t2i.pictures.pth=x", "unknown config key"),
    ],
)
def test_on_the_command_line_it_is_one_line(launch, flag, message, tmp_path):
    code, out = finish(launch(tmp_path / "run", flag))
    assert code == 1
    assert out.startswith("error: ")
    assert message in out
    assert out.count("\n") == 1
    assert not (tmp_path / "run").exists()
