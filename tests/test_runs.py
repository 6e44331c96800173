"""What a user meets who trains on files: one clear error with nothing written, a count, or a run."""

import hashlib
import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from conftest import save_params

from configs import vq as vq_digits
from mmada_jax.data import digits
from mmada_jax.devices import sharding
from mmada_jax.nets import transformer
from mmada_jax.tokens.tokenizer import TextTokenizer, chat
from mmada_jax.train import runs
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import check_run, model_program, train
from tests.run_files import changed, codes, config_of_files, own_files  # noqa: F401


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
    "truncated ArrayRecord": ({"data.t2i": codes("cut_codes")}, r"config.data.t2i.codes: .*is truncated"),
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
    with pytest.raises(ValueError, match=r"holds another model \(model.n_layers is 1 there and 2 now\)"):
        train(config, tmp_path / "other")
    assert sorted(tmp_path.rglob("*")) == before
