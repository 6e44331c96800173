"""What a user meets who trains on files: one clear error with nothing written, a count, or a run."""

import hashlib
import io
import json
import pickle
import shutil
import signal
import tarfile
import zlib

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import ROOT, save_params, xla_flags
from PIL import Image
from programs import Program

from configs import vq as vq_digits
from mmada_jax.data import digits
from mmada_jax.data.records import Record, pack
from mmada_jax.devices import sharding
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens.tokenizer import TextTokenizer, chat
from mmada_jax.train import metrics, optim, runs
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import check_run, make_step, model_program, train
from mmada_jax.weights import lazy, magvit_keys
from mmada_jax.weights.arrays import write_params
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.state import init_state, state_shardings

VQ = vq.Config(32, (1, 2), (1, 1), (1, 2), (1, 1), bits=6)
SIZE, N_CODES = 8, 16
STEPS = 6
N = 2 * STEPS  # records of a source: the rows of a task in a run


# ---- Files -----------------------------------------------------------------------------------------


def jpeg(i):
    pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((25, 20)).save(file, "JPEG")
    return file.getvalue()


def huge():
    """The start of a PNG of 20000x20000 pixels; the rest would never be read."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_tar(path, images):
    with tarfile.open(path, "w") as tar:
        for i, (suffix, data) in enumerate(images):
            for end, content in ((suffix, data), ("txt", f"picture {i}".encode())):
                member = tarfile.TarInfo(f"{i:03}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_codes(folder, image_tokenizer):
    """Records with codes, as launch/prepare.py leaves them."""
    folder.mkdir()
    shard, rng = "shard-00000-of-00001.array_record", np.random.default_rng(0)
    writer = ArrayRecordWriter(str(folder / shard), "group_size:1")
    for i in range(N):
        codes_N = rng.integers(0, VQ.codebook_size, N_CODES)
        writer.write(pack(Record(str(i), codes=codes_N, texts=(f"picture {i}",))))
    writer.close()
    about = {
        "records": N,
        "shards": {shard: N},
        "codes": N_CODES,
        "image_size": SIZE,
        "image_tokenizer": lazy.sha256(open_folder(image_tokenizer).tensors()),
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def write_image_tokenizer(folder):
    """A checkpoint of an image tokenizer of RGB images, random."""
    shapes = jax.eval_shape(lambda key: vq.init_params(key, VQ), jax.random.key(0))
    rng = np.random.default_rng(0)

    def random(x):
        array = 0.1 * rng.standard_normal(x.shape, np.float32)
        return lazy.Lazy(x.shape, array.dtype, lambda index: array[index])

    write_params(folder / "params", jax.tree.map(random, shapes), None)
    (folder / "config.json").write_text(json.dumps(magvit_keys.config_to_hf(VQ)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with data in four formats, some of it bad, an image tokenizer, and one of text."""
    folder = tmp_path_factory.mktemp("files")
    write_image_tokenizer(folder / "image_tokenizer")
    sentences = [f"picture {i}" for i in range(N)] + [f"the text of line {i}" for i in range(N)]
    TextTokenizer.train([*sentences, chat("say 1", "one")], 320).save(folder / "tokenizer.json")
    data = folder / "data"
    data.mkdir()
    pictures = [("jpg", jpeg(i)) for i in range(N)]
    write_tar(data / "pictures.tar", [*pictures[:-1], ("jpg", jpeg(0)[:200])])
    write_tar(data / "huge.tar", [*pictures[:-1], ("png", huge())])
    whole = (data / "pictures.tar").read_bytes()
    (data / "cut.tar").write_bytes(whole[: len(whole) // 2])
    table = pyarrow.table({"text": [f"the text of line {i}" for i in range(N)]})
    pyarrow.parquet.write_table(table, data / "texts.parquet", row_group_size=3)
    talks = [
        [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": f"say {i} " * (99 * (i == 5) or 1)},
        ]
        for i in range(N)
    ]
    (data / "talks.jsonl").write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in talks))
    write_codes(data / "codes", folder / "image_tokenizer")
    shutil.copytree(data / "codes", data / "cut_codes")
    (shard,) = (data / "cut_codes").glob("*.array_record")
    shard.write_bytes(shard.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def config(smoke_config, files):
    """configs/pretrain.py:digits,smoke for a tiny model on those files."""
    source = {"weight": 1.0}
    data = {
        "t2i": {"pictures": source | {"path": "pictures.tar", "format": "webdataset"}},
        "lm": {"texts": source | {"path": "texts.parquet", "format": "parquet"}},
        "lm_chat": {"talks": source | {"path": "talks.jsonl", "format": "jsonl"}},
        "mmu": {"pictures": source | {"path": "huge.tar", "format": "webdataset"}},
        "r2i": {},
    }
    return smoke_config | {
        "preset": "tiny",
        "text_vocab": 0,
        "text_tokenizer": str(files / "tokenizer.json"),
        "image_tokenizer": str(files / "image_tokenizer"),
        "image_size": SIZE,
        "max_text": 64,
        "steps": STEPS,
        "batch_size": 8,
        "save_every": 1,
        "mixture": {"t2i": 1, "lm": 1, "lm_chat": 1, "mmu": 1, "r2i": 0},
        "data_root": str(files / "data"),
        "data": data,
        "held_out": data,
        "eval_rows": 8,
        "samples": 2,
    }


def test_without_a_tokenizer_one_is_trained_on_the_runs_own_texts(config, files, tmp_path):
    own = config | {"text_tokenizer": "", "text_vocab": 340}
    tokenizer = runs.plan(parse(own), tmp_path).tokenizer
    assert len(tokenizer) <= 340
    given = TextTokenizer.load(files / "tokenizer.json")
    on_digits = TextTokenizer.train(digits.corpus(), 340)
    for text in ("picture 3", "the text of line 7", "say 5", chat("say 5", "say 5")):
        assert len(tokenizer.encode(text)) <= len(given.encode(text)) + 2
    assert len(tokenizer.encode("the text of line")) < len(on_digits.encode("the text of line")) / 2
    again = runs.plan(parse(own), tmp_path).tokenizer
    assert pickle.dumps(again) == pickle.dumps(tokenizer)
    # Nothing is said that the rows of the run's tasks don't say.
    of_one = own | {"mixture": {**own["mixture"], "lm": 0}}
    tokenizer = runs.plan(parse(of_one), tmp_path).tokenizer
    assert len(tokenizer.encode("the text of line")) > 5


def test_the_digits_keep_their_tokenizer_to_the_bit(smoke_config, image_tokenizer, tmp_path):
    values = smoke_config | {"image_tokenizer": str(image_tokenizer)}
    runs.plan(parse(values), tmp_path).tokenizer.save(tmp_path / "tokenizer.json")
    ids = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    # Models were trained with it.
    assert hashlib.sha256(json.dumps(sorted(ids.items())).encode()).hexdigest()[:16] == "d5e9dddf84731914"


def changed(config, changes):
    """A configuration with the values at dotted keys replaced."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *groups, name = key.split(".")
        at = config
        for group in groups:
            at = at[group]
        at[name] = value
    return config


def codes(path="codes", **values):
    return {"codes": {"path": path, "format": "arrayrecord"} | values}


# ---- Errors before anything is written ---------------------------------------------------------------

WRONG = {
    "missing path": (
        {"data.t2i.pictures.path": "nowhere.tar"}, r"config.data.t2i.pictures: .*nowhere.tar doesn't exist"
    ),
    "empty glob": ({"data.t2i.pictures.path": "*.tarball"}, r"config.data.t2i.pictures: no file matches"),
    "wrong column": (
        {"data.lm.texts.text": "body"}, r"config.data.lm.texts: .*has no 'body'; it has: text"
    ),
    "wrong format": (
        {"data.lm.texts.format": "webdataset"}, r"config.data.lm.texts: .*looks like 'parquet'"
    ),
    "truncated tar": ({"data.mmu.pictures.path": "cut.tar"}, r"config.data.mmu.pictures: .*cut.tar is tru"),
    "truncated ArrayRecord": ({"data.t2i": codes("cut_codes")}, r"config.data.t2i.codes: .*no whole Array"),
    "key of a source": (
        {"data.t2i.pictures.pth": "x"},
        r"unknown config key 'data.t2i.pictures.pth'; did you mean 'data.t2i.pictures.path'",
    ),
    "key": ({"batchsize": 8}, r"unknown config key 'batchsize'; did you mean 'batch_size'"),
    "batch": ({"batch_size": 12}, r"batch_size 12 is not divisible by the 8 data shards .*: 16"),
    "held-out rows": (
        {"eval_every": 2, "eval_rows": 12}, r"eval_rows 12 is not divisible by the 8 data shards .*: 16"
    ),
    "held-out sources": (
        {"eval_every": 2, "held_out": {}}, r"rows of 't2i' and config.held_out.t2i no source"
    ),
    "a task misspelt in data": (
        {"data.lmm": {"x": {"path": "x"}}},
        r"unknown config key 'data.lmm'; did you mean 'data.lm'",
    ),
    "a task misspelt in held_out": ({"held_out.t2l": {}}, r"'held_out.t2l'; did you mean 'held_out.t2i'"),
    "a task misspelt in mixture": ({"mixture.mmuu": 1}, r"'mixture.mmuu'; did you mean 'mixture.mmu'"),
    "too few ids for the bytes": (
        {"text_tokenizer": "", "text_vocab": 100},
        r"tokenizer of 100 ids has no room .* text_vocab must be at least \d+$",
    ),
    "task without a source": ({"mixture.r2i": 1}, r"rows of 'r2i' and config.data.r2i no source"),
    "length": ({"max_text": 300}, "lower max_text"),
    "image size": ({"image_size": 9}, "isn't a multiple of the image tokenizer's 2 pixels; choose 8"),
    "codes of another size": (
        {"data.t2i": codes(), "image_size": 16},
        r"config.data.t2i.codes has the codes of images of 8 pixels, this run.s have 16x16",
    ),
    "held-out codes of another size": (
        {"eval_every": 2, "held_out": {"t2i": codes()}, "image_size": 16, "mixture": {"t2i": 1}},
        r"config.held_out.t2i.codes has the codes of images of 8 pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(config, name, tmp_path):
    changes, message = WRONG[name]
    with pytest.raises((ValueError, OSError), match=message):
        train(changed(config, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.lm_chat": {}}, r"rows of 'lm_chat' and config.data.lm_chat no source"),
        ({"eval_every": 2, "held_out.lm": {}}, r"rows of 'lm' and config.held_out.lm no source"),
        ({"eval_every": 2, "eval_rows": 9}, r"eval_rows 9 is not divisible"),
    ],
)
def test_what_is_wrong_is_said_before_an_image_tokenizer_is_trained(
    smoke_config, changes, message, tmp_path
):
    config = changed(smoke_config | {"image_tokenizer": "image_tokenizer"}, changes)
    with pytest.raises(ValueError, match=message):
        check_run(config, tmp_path / "run", vq_digits.get_config("digits"))
    assert not (tmp_path / "run").exists()


def test_codes_of_another_image_tokenizer_are_refused(config, files, tmp_path):
    shutil.copytree(files / "data/codes", tmp_path / "codes")
    path = tmp_path / "codes/dataset.json"
    about = json.loads(path.read_text())
    for sha256 in ("0" * 64, None):
        path.write_text(json.dumps(about | {"image_tokenizer": sha256}))
        config = changed(config, {"data.t2i": codes(str(tmp_path / "codes"))})
        with pytest.raises(ValueError, match=r"config.data.t2i.codes has the codes of another image tok"):
            train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_codes_of_this_image_tokenizer_need_no_pixels(config, tmp_path):
    # Of text rows with an image no code is used, whosever they are.
    changes = {"data.t2i": codes(), "data.mmu": codes(), "data.lm": codes()}
    program = model_program(parse(changed(config, changes)), tmp_path, sharding.make_mesh())
    assert program.load(0, range(8)).rows.pixels_BIJC is None


def another_model(config, workdir):
    """A workdir of a model with fewer layers than that of `config`."""
    other = changed(config, {"model.n_layers": 1})
    what = runs.plan(parse(other), workdir)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), transformer.param_shapes(what.model))
    save_params(workdir, other, zeros)
    what.tokenizer.save(workdir / "tokenizer.json")


def test_another_model_is_no_beginning_and_its_workdir_is_left_alone(config, tmp_path):
    another_model(config, tmp_path / "other")
    with pytest.raises(ValueError, match=r"config.init: .* another model \(n_layers 1 there and 2 here\)"):
        train(config | {"init": "../other"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match=r"config.init: .*nowhere is no workdir of a model"):
        train(config | {"init": "../nowhere"}, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"holds another model \(model.n_layers is 1 there and None now\)"):
        train(config, tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before


# ---- Runs ------------------------------------------------------------------------------------------


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
