"""Adapters trained beside a frozen model: what changes, what a workdir holds, and the same in PEFT."""

import json
import shutil

import jax
import numpy as np
import pytest

from mmada_jax.devices import sharding
from mmada_jax.nets import lora, transformer
from mmada_jax.programs import convert as program
from mmada_jax.serve.api import MMaDA
from mmada_jax.train import metrics
from mmada_jax.train.runs import parse
from mmada_jax.train.supervised import model_program, train
from mmada_jax.weights.adapters import read_peft
from mmada_jax.weights.checkpoint import trust
from mmada_jax.weights.convert import from_torch, to_peft, to_torch
from mmada_jax.weights.folder import open_folder
from mmada_jax.weights.lazy import in_memory
from mmada_jax.weights.workdir import MODEL, newest_step
from tests.merged import merge
from tests.rl_toys import params as params_of
from tests.test_exported import transformers  # noqa: F401
from tests.test_train import two_steps

RANK = 3


@pytest.fixture(name="config")
def lora_config(smoke_config, model_workdir, image_tokenizer):
    return smoke_config | {
        "init": str(model_workdir), "image_tokenizer": str(image_tokenizer), "text_vocab": 0, "steps": 4,
        "save_every": 2, "log_every": 1, "batch_size": 8, "lora": {"rank": RANK, "alpha": 6.0},
        "base_dtype": "float32", "optim": {"lr": 1e-2, "warmup": 0, "floor": 1.0}, "eval_every": 4,
        "eval_rows": 8, "samples": 1,
    }  # fmt: skip


@pytest.fixture(name="trained", scope="module")
def trained_workdir(smoke_config, model_workdir, image_tokenizer, tmp_path_factory):
    """A workdir of adapters, as two starts of a run have left it."""
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    config = lora_config.__wrapped__(smoke_config, model_workdir, image_tokenizer)
    for steps in (2, 4):
        train(config | {"steps": steps, "eval_every": 0}, workdir)
    return workdir


def test_only_adapters_are_trained_saved_and_resumed_to_the_bit(config, trained, model_workdir, tmp_path):
    train(config, tmp_path / "run")
    ours, again = params_of(tmp_path / "run"), params_of(trained)
    jax.tree.map(np.testing.assert_array_equal, ours, again)
    assert set(ours) == {"q_DHK", "k_DGK", "v_DGK", "o_HKD", "gate_DF", "up_DF", "down_FD"}
    assert all(np.any(of["b_NRO"]) for of in ours.values())
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    assert np.isfinite([value for name, value in row.items() if name.startswith("held_out")]).all()
    about = json.loads((tmp_path / "run" / MODEL).read_text())["adapter"]
    assert (about["rank"], about["alpha"], about["targets"].count("+")) == (RANK, 6.0, 6)
    # What is opened is the base with the adapters in it.
    source, base = open_folder(trained), open_folder(model_workdir)
    want = merge(in_memory(base.params), ours, lora.LoraConfig(RANK, 6.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), in_memory(source.params), want)
    for piece in (np.s_[1:2], np.s_[:, 3:7], np.s_[0:1, :, 1:2]):
        whole = np.asarray(source.params["blocks"]["q_DHK"])
        np.testing.assert_array_equal(source.params["blocks"]["q_DHK"][piece], whole[piece])
    model = MMaDA.load(trained)
    assert model.generate("1+1", max_new=2).text is not None


@pytest.mark.slow
def test_the_base_may_be_held_in_8_bits(config, trained, tmp_path):
    train(config | {"base_dtype": "int8"}, tmp_path / "run")
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[-1]
    near = metrics.read(trained / "metrics.jsonl")[-1]
    np.testing.assert_allclose(row["loss"], near["loss"], rtol=0.02)
    assert row["loss"] != near["loss"]
    assert np.isfinite([value for name, value in row.items() if name.startswith("held_out")]).all()
    # The adapters are beside the model itself, not beside what was held of it.
    assert open_folder(tmp_path / "run").dtype == open_folder(trained).dtype


@pytest.mark.slow
def test_meshes_and_parts_of_a_batch_agree(config, tmp_path):
    adamw = config["optim"] | {"eps": 1e-3}  # no sign(0) to amplify noise
    config, results = config | {"optim": adamw, "eval_every": 0}, []
    one, eight = {"devices": jax.devices()[:1]}, {"data": 2, "fsdp": 2, "tensor": 2}
    for accumulate, sizes in ((1, one), (2, eight)):
        mesh = sharding.make_mesh(**sizes)
        made = model_program(parse(config | {"accumulate": accumulate}), tmp_path, mesh)
        results.append(two_steps(made, config, mesh)[:2])
    (loss, params), (other_loss, other) = results
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), other, params)


def test_another_base_is_refused_and_a_lost_one_is_named(config, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(trained, tmp_path / "elsewhere" / "run")
    about = json.loads((tmp_path / "run" / MODEL).read_text())
    with pytest.raises(FileNotFoundError, match=r"holds adapters alone, and their base isn't where it was"):
        open_folder(tmp_path / "elsewhere" / "run")  # its path is relative to where the workdir was

    def point(**values):
        (tmp_path / "run" / MODEL).write_text(json.dumps(about | {"adapter": about["adapter"] | values}))
        (tmp_path / "run" / "files.sha256.json").unlink(missing_ok=True)
        program.main(["trust", "--src", str(tmp_path / "run")])

    point(base=config["init"], base_sha256="0" * 64)
    with pytest.raises(ValueError, match="the adapters belong to another base than the model in"):
        open_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="the adapters belong to another base"):
        train(config | {"steps": 6, "eval_every": 0}, tmp_path / "run")
    point(base=config["init"])
    assert open_folder(tmp_path / "run").adapter.lora.rank == RANK


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "", "text_vocab": 400}, "lora.rank is 3 and config.init is empty"),
        ({"lora": {"rank": 4096}}, "lora.rank is 4096, q_proj has [0-9]+ rows or columns; choose at most"),
        ({"lora": {"rank": 2, "targets": "head"}}, "head"),
        ({"lora": {"rank": -1}}, "lora.rank is -1"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_written(config, tmp_path, values, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        train(config | values, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_adapters(config, trained):
    with pytest.raises(ValueError, match=r"lora.rank is 3 there and 4 now"):
        train(config | {"lora": {"rank": 4, "alpha": 6.0}, "steps": 6}, trained)


# ---- PEFT ----------------------------------------------------------------------------------------


@pytest.fixture(name="exchanged", scope="module")
def exchanged_folders(trained, model_workdir, tmp_path_factory):
    """The base as PyTorch has it, and the adapters as PEFT has them."""
    folder = tmp_path_factory.mktemp("exchanged")
    to_torch(model_workdir, folder / "base")
    program.main(["to-peft", "--src", str(trained), "--dst", str(folder / "adapter"), "--base", "base"])
    return folder


def test_what_peft_has_comes_back(trained, exchanged, tmp_path, capsys):
    source = open_folder(trained)
    found = read_peft(exchanged / "adapter", source.config)
    assert found.lora == source.adapter.lora
    jax.tree.map(np.testing.assert_array_equal, found.arrays, in_memory(source.adapter.arrays))
    from_torch(exchanged / "base", tmp_path / "merged", adapter=exchanged / "adapter")
    assert "trained beside other weights" not in capsys.readouterr().err
    (exchanged / "adapter" / "base.json").write_text(json.dumps({"sha256": "0" * 64}))
    from_torch(exchanged / "base", tmp_path / "again", adapter=exchanged / "adapter")
    assert (
        "warning: the adapters were trained beside other weights than those in" in capsys.readouterr().err
    )
    (exchanged / "adapter" / "base.json").write_text(json.dumps({"sha256": source.adapter.base_sha256}))
    merged, want = (in_memory(open_folder(path).params) for path in (tmp_path / "merged", trained))
    jax.tree.map(np.testing.assert_array_equal, merged, want)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_logits_are_those_of_peft(trained, exchanged, transformers):  # noqa: F811
    peft = pytest.importorskip("peft")
    import torch

    source = open_folder(trained)
    ids = np.random.default_rng(0).integers(0, source.config.vocab, (2, 20)).astype(np.int32)
    h_BLD = transformer.hidden_states(in_memory(source.params), source.config, ids, ids >= 0)
    ours = transformer.unembed(in_memory(source.params), source.config, h_BLD)
    base = transformers.AutoModel.from_pretrained(exchanged / "base", trust_remote_code=True)
    plain = base(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    adapted = peft.PeftModel.from_pretrained(base, exchanged / "adapter").eval()
    theirs = adapted(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(theirs - plain).max() > 0.01 * np.abs(plain).max()
    # What PEFT saves is read as well, whichever of the matrices are adapted.
    fresh = transformers.AutoModel.from_pretrained(exchanged / "base", trust_remote_code=True)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "up_proj"], use_rslora=True)
    made = peft.get_peft_model(fresh, config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    made.save_pretrained(exchanged / "theirs")
    found = read_peft(exchanged / "theirs", source.config)
    assert found.lora == lora.LoraConfig(4, 4.0, "q_proj+up_proj")
    params = merge(base_of(source), found.arrays, found.lora)
    h_BLD = transformer.hidden_states(params, source.config, ids, ids >= 0)
    theirs = made(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    ours = transformer.unembed(params, source.config, h_BLD)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def base_of(source):
    about = json.loads((source.path / MODEL).read_text())["adapter"]
    return in_memory(open_folder(source.path / about["base"]).params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which isn't known"),
        ({"bias": "all"}, "bias is 'all', which isn't known"),
        ({"rank_pattern": {"q": 1}}, "rank_pattern is"),
        ({"r": 5}, r"lora_A.weight has shape \(3, "),
        (None, "has no adapter_config.json; an adapter of PEFT's has it"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(exchanged, trained, tmp_path, change, message):
    shutil.copytree(exchanged / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_peft(tmp_path / "adapter", open_folder(trained).config)


def test_a_whole_model_has_no_adapters(model_workdir, tmp_path):
    with pytest.raises(ValueError, match="holds no adapters but a whole model; to-torch exports that"):
        to_peft(model_workdir, tmp_path / "adapter")
    assert newest_step(model_workdir).is_dir() and not (tmp_path / "adapter").exists()


def test_several_adapters_are_served_on_one_base(trained, model_workdir, tmp_path):
    def changed(name, **values):
        """The adapters with other values about them; they say less as alpha becomes smaller."""
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        about = json.loads((folder / MODEL).read_text())
        about["adapter"] |= {"base": str(model_workdir)} | values
        (folder / MODEL).write_text(json.dumps(about))
        trust(folder)
        return folder

    named = {"first": changed("first", alpha=0.3), "second": changed("second", alpha=1.2)}
    to_peft(named["first"], tmp_path / "peft")
    named["of PEFT"] = tmp_path / "peft"
    model = MMaDA.load(model_workdir, adapters=named)
    questions = ["what is 3 plus 4?", "what is 1 plus 1?", "and now?"]

    def answers(of):
        job = of.text_job(questions, max_new=12, block=4)
        return [ids.tolist() for ids in of.run(job)]

    alone = {"": answers(MMaDA.load(model_workdir)), "first": answers(MMaDA.load(named["first"]))}
    alone |= {"second": answers(MMaDA.load(named["second"])), "of PEFT": alone["first"]}
    assert len({str(ids) for ids in alone.values()}) == 3  # the adapters do something
    for name, want in alone.items():
        assert answers(model.adapted(name)) == want, name

    # Requests for all of them at once, in one engine.
    tickets = {
        name: model.engine.submit(model.text_job(questions, max_new=12, block=4), adapter=name)
        for name in alone
    }
    for name, rows in tickets.items():
        assert [ticket.result().tolist() for ticket in rows] == alone[name]
    assert model.adapted("first").engine is model.engine
    assert model.adapted("first").params is model.params
    first = model.adapted("first")
    thought, _ = first.think_and_draw("a seven", steps=2, together=True)
    assert thought.ids.size

    with pytest.raises(ValueError, match="no adapter 'third'; known: 'first', 'of PEFT', 'second'"):
        model.adapted("third")
    with pytest.raises(ValueError, match="no adapter 'third'"):
        model.engine.submit(model.text_job("a", max_new=4), adapter="third")
    with pytest.raises(ValueError, match="another base"):
        MMaDA.load(model_workdir, adapters={"other": changed("other", base_sha256="0" * 64)})
    with pytest.raises(ValueError, match="'' is no name of an adapter"):
        MMaDA.load(model_workdir, adapters={"": tmp_path / "peft"})
    for change, problem in (
        ({"lora_alpha": None}, "lora_alpha=None; both must be positive"), ({"r": "2"}, "r='2'"),
    ):  # fmt: skip
        odd = tmp_path / f"odd {problem[:3]}"
        shutil.copytree(tmp_path / "peft", odd)
        about = json.loads((odd / "adapter_config.json").read_text())
        (odd / "adapter_config.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=problem):
            MMaDA.load(model_workdir, adapters={"odd": odd})
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="damaged or truncated"):
        MMaDA.load(model_workdir, adapters={"junk": tmp_path / "peft"})
    with pytest.raises(ValueError, match="no adapters but a whole model"):
        MMaDA.load(model_workdir, adapters={"whole": model_workdir})
    with pytest.raises(ValueError, match="name their base"):
        MMaDA.load(trained, adapters={"first": trained})
