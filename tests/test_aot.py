"""Compilation for TPUs that aren't there: topologies, the report, and what it says of bad input."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import pretrain, unigrpo
from mmada_jax import config
from mmada_jax.devices import chips
from mmada_jax.nets import transformer
from mmada_jax.tokens import vocab
from mmada_jax.train import aot, runs
from mmada_jax.train.rl.run import RLRun

ROOT = pathlib.Path(__file__).parent.parent
# An 8B step in small: the same program, heads as wide, in seconds instead of minutes.
SMALL = """
from configs import pretrain

def get_config(arg):
    config = pretrain.get_config("8b,phase=1")
    config.batch_size = 8
    config.model.update(d_model=512, n_layers=3, n_heads=4, n_kv_heads=4, d_mlp=1024)
    return config
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(SMALL)
    return f"{path}:"


def launch(*flags):
    command = [sys.executable, ROOT / "launch/aot.py", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_topologies_by_shape_and_by_the_clouds_names():
    assert chips.topology("v5p:4x4x4") == chips.topology("v5p-128") == chips.Topology("v5p", (4, 4, 4))
    assert chips.topology("v5e-256").shape == chips.topology("v5litepod-256").shape == (16, 16)
    assert chips.topology("v6e:8x8").chips == 64
    two = chips.topology("v5e:16x16", slices=2)
    assert (two.chips, str(two)) == (512, "2 x v5e:16x16")


@pytest.mark.parametrize("text", ["v5p:3x3x3", "v9:2x2", "v5e", "v5p-64x", "v5e-7", "v5p-1"])
def test_unknown_topologies_list_the_known_ones(text):
    with pytest.raises(ValueError, match=f"unknown topology '{text}'") as error:
        chips.topology(text)
    for name, chip in chips.CHIPS.items():
        assert f"{name}: {' '.join(chip.topologies)}" in str(error.value)


def test_slices_are_at_least_one():
    with pytest.raises(ValueError, match="slices is 0"):
        chips.topology("v5p:4x4x4", 0)


def test_options_are_those_of_the_chip():
    assert chips.of_kind("cpu") is None
    assert chips.of_kind("TPU v6 lite").compiler_options["xla_tpu_scoped_vmem_limit_kib"] == "65536"


@pytest.mark.aot
def test_training_step(small):
    run = launch("--config", small, "--topology", "v5p:2x2x1", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["config"] == small
    assert (report["topology"], report["chips"], report["fits"]) == ("v5p:2x2x1", 4, True)
    assert (report["rows_per_chip"], report["row_length"]) == (2, 387)
    assert report["attention_kernel"] == "mmada_attention_forward mmada_attention_backward"
    # Blocks, attention (two products), head; three passes. Per chip.
    per_token = 2 * 3 * (4 * 512 * 512 + 3 * 512 * 1024) + 4 * 387 * 512 * 3 + 2 * 512 * 134656
    assert report["model_flops"] == 3 * 2 * 387 * per_token
    # Attention is computed once more than the model asks for, RoPE has products of its own.
    assert 1 < report["matmul_flops"] / report["model_flops"] < 1.2
    assert 0 < report["mfu_ceiling"] < 1
    assert 0 < report["hbm_peak_gib"] <= report["hbm_total_gib"] < report["hbm_limit_gib"] == 95.74
    assert report["compile_seconds"] > 0
    assert report["layer_loop_blocking_mb"] > 0
    gathers = report["collectives"]["all-gather"]
    assert gathers["count"] > gathers["async"] >= 0
    assert gathers["bytes"] > 2 * 512 * 134656


@pytest.mark.aot
def test_drawing_with_the_8b_on_a_tensor_mesh():
    flags = ["--step", "draw", "--topology", "v5e:2x2", "--config.batch_size=1"]
    run = launch("--config", "configs/pretrain.py:8b,phase=3", *flags)
    assert run.returncode == 0, run.stderr
    assert "4 chips (data 1 fsdp 1 tensor 4)" in run.stdout
    assert "attention    mmada_attention_forward" in run.stdout
    assert "this is not a throughput" in run.stdout


@pytest.mark.aot
def test_steps_of_decoding_text(small):
    """A cached step computes a block of 32 tokens, a plain one the whole row of 387."""
    common = ("--config", small, "--topology", "v5p:2x2x1", "--json", "--config.batch_size=2")
    plain, cached = (json.loads(launch(*common, "--step", step).stdout) for step in ("text", "text_cached"))
    assert plain["fits"] and cached["fits"]
    assert (plain["row_length"], cached["row_length"]) == (387, 32)
    # What the other 355 tokens of the two rows take: three layers, and attention. Per chip.
    layers = 2 * 2 * 355 * 3 * (4 * 512 * 512 + 3 * 512 * 1024) / 4
    assert 1 < (plain["matmul_flops"] - cached["matmul_flops"]) / layers < 1.4
    weights = 2 * (134656 * 512 * 2) / 4  # embedding and head of 4 chips, bf16
    assert cached["roofline_ms"] > 1e3 * weights / 2765e9
    assert plain["roofline_ms"] > 0


@pytest.mark.aot
def test_a_step_that_does_not_fit_says_by_how_much_and_what_to_change():
    flags = ["--topology", "v5e:4x4", "--config.batch_size=128", "--json"]
    run = launch("--config", "configs/pretrain.py:8b,phase=3", *flags)
    assert run.returncode == 1
    report = json.loads(run.stdout)
    assert report["fits"] is False
    assert report["hbm_peak_gib"] > report["hbm_limit_gib"] == 15.75
    for words in ("does not fit", "batch_size=64", "remat=attention+middle+qkv", "tensor=2", "more chips"):
        assert words in run.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v5p:5x5x5"], "unknown topology 'v5p:5x5x5'; known are"),
        pytest.param(
            ["--topology", "v5p:4x4x4", "--config.batch_size=100"],
            "the next that is: 128",
            marks=pytest.mark.aot,
        ),
        (["--topology", "v5p:4x4x4", "--config.model.remat=qvk"], "it must be 'none', 'full', or some of"),
        pytest.param(
            ["--topology", "v5p:4x4x4", "--config.mesh.tensor=3"],
            "doesn't fit 64 devices",
            marks=pytest.mark.aot,
        ),
        (["--topology", "v5p:4x4x4", "--config.batchsize=8"], "unknown config key"),
        (["--topology", "v5p:4x4x4", "--config.loss_chunk=0"], "loss_chunk is 0"),
        (["--topology", "v5e:16x16", "--step", "draw"], "32 can't be split over the 256 chips"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    run = launch("--config", "configs/pretrain.py:8b,phase=3", *flags)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("8b,phase=4", "phase is 4"),
        ("8b,fast", "8b has no fast form"),
        ("digits,phase=2", "digits has no phases"),
    ],
)
def test_bad_config_arguments_are_one_line(arg, message):
    run = launch("--config", f"configs/pretrain.py:{arg}", "--topology", "v5p:2x2x1")
    assert run.returncode == 1
    assert f"error: {message}" in run.stderr
    assert "Traceback" not in run.stderr


def test_one_file_takes_the_program_of_one_step(tmp_path):
    flags = ("--topology", "v5p:2x2x1", "--program", tmp_path / "hlo.txt")
    run = launch("--config", "configs/unigrpo.py:8b", *flags)
    assert run.returncode == 1
    assert "name one of rollout, score, update with --step" in run.stderr


def test_reinforcement_learning_without_its_start_says_so():
    run = launch("--config", "configs/unigrpo.py:digits", "--topology", "v5p:2x2x1")
    assert run.returncode == 1
    assert f"config.init: there is no {ROOT}/runs/cot; train it first" in run.stderr
    assert "use unigrpo.py:8b" in run.stderr


def test_training_on_it_says_what_is_missing(tmp_path):
    command = [sys.executable, ROOT / "launch/train.py", "--config", "configs/pretrain.py:8b,phase=2"]
    run = subprocess.run(
        [*command, "--workdir", tmp_path / "run", "--config.batch_size=16"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert f"no image tokenizer: {tmp_path}/magvitv2 is no workdir" in run.stderr
    assert not (tmp_path / "run").exists()


def test_sizes_of_ones_own_are_those_of_the_configuration_and_its_tokenizers(model_workdir, smoke_config):
    # As training in that workdir would have them.
    own = runs.parse(smoke_config | {"image_tokenizer": str(runs.parse(
        json.loads((model_workdir / "config.json").read_text())).image_tokenizer)})  # fmt: skip
    what = aot.subject(own, "train", workdir=model_workdir)
    plan = runs.plan(own, model_workdir)
    assert what.length == plan.shape.length
    assert what.model == plan.model
    draw = aot.subject(own, "draw", workdir=model_workdir)
    assert draw.logits == 2 * own.batch_size * plan.shape.n_image * plan.vocab.codebook_size
    # From scratch, with the image tokenizer that training makes first.
    scratch = runs.parse(smoke_config | {"image_tokenizer": ""})
    assert aot.subject(scratch, "train").length == what.length
    with pytest.raises(FileNotFoundError, match=r"no image tokenizer: .*elsewhere is no workdir"):
        aot.subject(runs.parse(smoke_config | {"image_tokenizer": "../elsewhere"}), "train")


def test_what_it_starts_from_gives_the_vocabulary(model_workdir, smoke_config):
    values = json.loads((model_workdir / "config.json").read_text())
    started = runs.parse(values | {"init": str(model_workdir), "text_vocab": 0})
    what = aot.subject(started, "train", workdir=model_workdir.parent / "next")
    assert what.model.vocab == runs.plan(runs.parse(values), model_workdir).model.vocab


def test_sizes_of_reinforcement_learning_are_those_of_its_start(model_workdir):
    values = unigrpo.get_config("digits,smoke").to_dict() | {"init": str(model_workdir)}
    own = config.from_dict(RLRun, values)
    model = aot.rl_model(own, model_workdir.parent / "rl")
    plan = runs.plan(runs.parse(json.loads((model_workdir / "config.json").read_text())), model_workdir)
    assert (model.vocab, model.grid, model.max_text) == (plan.vocab, plan.grid, plan.max_text)
    assert aot.subject(own, "score", workdir=model_workdir.parent / "rl").model == model.config


def test_the_published_model_needs_no_files(tmp_path):
    known = runs.parse(pretrain.get_config("8b,phase=3").to_dict())
    plan = runs.foresee(known, tmp_path / "none")
    assert (plan.vocab, plan.grid, plan.model.vocab) == (vocab.LLADA, (32, 32), 134656)
    # Its own tokenizer counts where there is one.
    (tmp_path / "magvitv2").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no image tokenizer: .*{tmp_path.name}/magvitv2"):
        runs.foresee(known, tmp_path / "none")


@pytest.fixture
def nothing_kept():
    """jax doesn't keep what it compiles: what is for a TPU can't be read back without one."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.aot
@pytest.mark.usefixtures("nothing_kept")
def test_a_model_of_ones_own_is_compiled(model_workdir):
    own = runs.parse(json.loads((model_workdir / "config.json").read_text()))
    report = aot.report(own, chips.topology("v5e:2x2"), workdir=model_workdir)
    plan = runs.plan(own, model_workdir)
    assert report["fits"]
    assert (report["row_length"], report["vocabulary"]) == (plan.shape.length, plan.model.vocab)


@pytest.mark.aot
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(("cache", "passes"), [("none", 1), ("dual", 2)])
def test_rollouts_count_their_loop_once(model_workdir, cache, passes):
    values = unigrpo.get_config("digits,smoke").to_dict() | {"init": str(model_workdir)}
    values["tasks"]["arithmetic"]["text"] |= {"cache": cache, "block": 4}
    own, workdir = config.from_dict(RLRun, values), model_workdir.parent / "rl"
    report = aot.report(own, chips.topology("v5e:2x2"), "rollout", task="arithmetic", workdir=workdir)
    model = aot.rl_model(own, workdir).config
    forward = transformer.forward_flops(model, 16, 42, 16 * 4 * model.vocab)
    assert report["model_flops"] == passes * forward // 4
    # On one device the 4 responses to a prompt share the first of two passes.
    alone = aot.subject(own, "rollout", "arithmetic", workdir).flops(row_parts=1)
    assert alone == forward * (1 if cache == "none" else 1 + 1 / 4)
    assert 0.8 < report["matmul_flops"] / report["model_flops"] < 1.5
    assert report["mfu_ceiling"] < 1


def test_a_gpu_is_accounted_for_on_the_host():
    flags = ["--topology", "h100:1x1", "--config.lora.rank=16", "--config.batch_size=1", "--json"]
    report = json.loads(launch("--config", "configs/pretrain.py:8b,phase=3", *flags).stdout)
    assert report["fits"]
    # The base in bfloat16, and adapters with their moments in float32.
    assert 15 < report["hbm_arguments_gib"] < 16
    assert report["hbm_peak_gib"] < report["hbm_limit_gib"] < 80
    assert report["mfu_ceiling"] is None
