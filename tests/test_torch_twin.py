"""Ours against the same model in plain PyTorch (torch_twin.py), part by part; and the benchmark."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: bash launch/test.sh --all")

import torch_twin as twin  # noqa: E402

import mmada_jax  # noqa: E402
from launch import bench  # noqa: E402
from launch.benchmarks import twin as benchmark  # noqa: E402
from mmada_jax.diffusion import corrupt, denoise, loss, rules  # noqa: E402
from mmada_jax.kernels.attention import attention  # noqa: E402
from mmada_jax.nets import rope, transformer  # noqa: E402
from mmada_jax.tokens import layout  # noqa: E402
from mmada_jax.weights import llada_keys  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
modeling = benchmark.module("mmada_jax/weights/modeling_mmada.py")

VOCAB, MAX_TEXT, N_IMAGE = benchmark.VOCAB, benchmark.MAX_TEXT, benchmark.N_IMAGE
CONFIG = dataclasses.replace(transformer.PRESETS["tiny"], vocab=VOCAB.rows)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Two threads in step are slow at this size where other processes want the cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def params():
    # The norms' scales are drawn too, so that a scale that goes unused is noticed.
    params = transformer.init_params(jax.random.key(0), CONFIG)
    rng = np.random.default_rng(1)

    def shake(path, x):
        if path[-1].key.endswith("norm_D"):
            x = x + rng.normal(0, 0.1, x.shape).astype(np.float32)
        return x

    return jax.tree.map_with_path(shake, params)


@pytest.fixture
def model(params):
    return benchmark.load_twin(params, CONFIG)[0]


@pytest.fixture(scope="module")
def data():
    return benchmark.make_data(n_train=8, n_generate=3)


def ours_of(x):
    return jnp.asarray(x.numpy())


def assert_close(ours, theirs, tolerance=1e-5):
    """Largest difference relative to the largest value."""
    theirs = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else theirs
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_norm():
    x, norm = normal(2, 5, 64), modeling.RMSNorm(64, 1e-5)
    norm.weight.data = 1 + 0.1 * normal(64, seed=1)
    ours = transformer.rms_norm(ours_of(x), ours_of(norm.weight.data), 1e-5)
    assert_close(ours, norm(x))


def test_rope():
    x = normal(2, 4, 9, 16)
    theirs = modeling.rope(x, *modeling.rope_tables(9, 16, 500000.0))
    table = (x[None, None] for x in rope.rope_table(9, 16, 500000.0))
    assert_close(rope.rope(ours_of(x), *table), theirs)


def test_attention(data):
    valid = torch.from_numpy(data["train"].valid)
    B, L = valid.shape
    q, k, v = (normal(B, 4, L, 16, seed=seed) for seed in range(3))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
    ours = attention(ours_of(q), ours_of(k), ours_of(v.transpose(1, 2).flatten(2)), ours_of(valid))
    assert not valid.all()
    assert_close(np.asarray(ours)[valid], theirs.transpose(1, 2).flatten(2)[valid])


def test_block(params, model, data):
    valid = torch.from_numpy(data["train"].valid)
    x, layer = normal(*valid.shape, CONFIG.d_model), 1
    tables = model.rope_tables(x.shape[1], x.device)
    theirs = model.model.transformer.blocks[layer](x, *tables, valid[:, None, None, :])
    weights = jax.tree.map(lambda w: w[layer], params["blocks"])
    table = rope.rope_table(x.shape[1], CONFIG.d_head, CONFIG.rope_theta)
    table = (x[None, None] for x in table)
    ours, _ = transformer._Block(CONFIG).apply(
        {"params": weights}, ours_of(x), jnp.float32(layer), None, ours_of(valid), *table, None, None
    )
    assert_close(np.asarray(ours)[valid], theirs[valid])


def test_logits(params, model, data):
    assert benchmark.logits_difference(params, CONFIG, model, data["train"]) < 1e-5


def test_logits_in_bf16(params, model, data):
    batch, config = data["train"], dataclasses.replace(CONFIG, dtype="bfloat16")
    h_BLD = transformer.hidden_states(params, config, jnp.asarray(batch.tokens), batch.valid)
    assert h_BLD.dtype == jnp.bfloat16
    ours = transformer.unembed(params, config, h_BLD)
    tensors = benchmark.to_torch(batch, model)
    theirs = model.bfloat16()(tensors["tokens"], tensors["valid"]).logits
    assert theirs.dtype == torch.bfloat16
    assert_close(np.asarray(ours)[batch.valid], theirs[tensors["valid"]], 2e-2)


def test_corruption_loss_and_gradient(params, model, data):
    batch, key = data["train"], jax.random.key(3)
    seen = corrupt.corrupt(key, batch, VOCAB, benchmark.OBJECTIVE)

    def total(params):
        h_BLD = transformer.hidden_states(params, CONFIG, seen.tokens_BL, batch.valid)
        return loss.weighted_nll(h_BLD, params["head_DV"], seen.targets_BL, seen.weights_BL)[0]

    value, grads = jax.value_and_grad(total)(params)

    # The same draws for both.
    t_B = jax.random.uniform(jax.random.fold_in(key, 0), batch.task.shape)
    noise_BL = jax.random.uniform(jax.random.fold_in(key, 1), batch.tokens.shape)
    coefficients = torch.tensor([getattr(benchmark.OBJECTIVE, task) for task in layout.TASKS])
    tensors = benchmark.to_torch(batch, model)
    tokens, weights = twin.corrupt(
        tensors,
        VOCAB.mask,
        coefficients,
        torch.tensor(np.asarray(t_B)),
        torch.tensor(np.asarray(noise_BL)),
    )
    np.testing.assert_array_equal(seen.tokens_BL, tokens)
    assert_close(seen.weights_BL, weights)

    their_value = twin.loss(model, tokens, tensors["valid"], tensors["tokens"], weights)
    their_value.backward()
    assert float(value) == pytest.approx(their_value.item(), rel=1e-5)
    ours = llada_keys.params_to_torch(grads, CONFIG)
    for name, parameter in model.named_parameters():
        assert_close(ours[name], parameter.grad, 1e-4)


def test_training_step_of_the_twin_learns(model, data):
    tensors = benchmark.to_torch(data["train"], model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    torch.manual_seed(0)
    step = functools.partial(twin.train_step, model, optimizer, tensors, VOCAB.mask, torch.ones(5))
    losses = [step().item() for _ in range(20)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def generate(params, batch, rule, start, length, unconditional=None, config=CONFIG):
    return denoise.denoise(
        transformer.Network(params, config),
        jnp.asarray(batch.tokens),
        batch.valid,
        start=start,
        length=length,
        rule=rule,
        vocab=VOCAB,
        key=jax.random.key(0),
        unconditional=unconditional,
    )


@pytest.mark.parametrize("steps", [8, 16, 6])
def test_greedy_text(params, model, steps):
    # Prompts of different lengths: the padding must not matter to either.
    prompts = [[20, 21, 22, 23, 24], [30, 31, 32], [40, 41, 42, 43]]
    batch = layout.continuation(VOCAB, prompts, 16)
    rule = rules.TextRule(steps=steps, block=8)
    ours = generate(params, batch, rule, start=5, length=16)
    tensors = benchmark.to_torch(batch, model)
    theirs = twin.generate_text(
        model,
        tensors["tokens"],
        tensors["valid"],
        start=5,
        length=16,
        steps=steps,
        block=8,
        mask=VOCAB.mask,
    )
    np.testing.assert_array_equal(ours, theirs)
    assert not (theirs == VOCAB.mask).any()


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_greedy_text_with_a_cache(n_kv_heads):
    config = dataclasses.replace(CONFIG, n_kv_heads=n_kv_heads)
    # Fresh weights hardly look at other tokens; with these it matters what is stored.
    params = jax.tree.map_with_path(
        lambda path, x: x * {"o_HKD": 6, "down_FD": 3, "head_DV": 3}.get(path[-1].key, 1),
        transformer.init_params(jax.random.key(0), config),
    )
    prompts = [[20, 21, 22, 23, 24], [30, 31, 32, 33, 34]]
    batch, model = layout.continuation(VOCAB, prompts, 20), benchmark.load_twin(params, config)[0]
    tokens = benchmark.to_torch(batch, model)["tokens"]
    of_row = {"start": 5, "length": 20}
    theirs = twin.generate_text_cached(model, tokens, **of_row, block=8, mask=VOCAB.mask)
    texts = {}
    for cache in ("dual", "none"):
        rule = rules.TextRule(block=8, cache=cache, never=(VOCAB.mask,))
        texts[cache] = generate(params, batch, rule, **of_row, config=config)
    np.testing.assert_array_equal(texts["dual"], theirs)
    assert (texts["none"] != texts["dual"]).any()
    assert not (theirs == VOCAB.mask).any()


@pytest.mark.parametrize("steps", [12, 5, 1])
def test_argmax_image(params, model, data, steps):
    batch, uncond = data["image"], data["uncond"]
    start = MAX_TEXT + 2
    rule = rules.ImageRule(steps=steps, guidance=2.0, temperature=0.0, draw="argmax")
    ours = generate(params, batch, rule, start, N_IMAGE, (jnp.asarray(uncond.tokens), uncond.valid))
    tensors, unconditional = benchmark.to_torch(batch, model), benchmark.to_torch(uncond, model)
    theirs = twin.generate_image(
        model,
        tensors["tokens"],
        tensors["valid"],
        unconditional["tokens"],
        unconditional["valid"],
        start=start,
        length=N_IMAGE,
        steps=steps,
        guidance=2.0,
        mask=VOCAB.mask,
        offset=VOCAB.image_offset,
        codes=VOCAB.codebook_size,
        temperature=0.0,
        sample=False,
    )
    np.testing.assert_array_equal(ours, theirs)
    assert not (theirs == VOCAB.mask).any()


def test_benchmark_writes_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "CACHED", dataclasses.replace(CONFIG, vocab=200, n_layers=1))
    monkeypatch.setattr(benchmark, "N_CACHED_NEW", 40)
    arguments = ["--preset", "tiny", "--rows", "4", "--repeats", "1"]
    bench.main(["twin", *arguments, "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["logits_difference"] < 1e-4
    assert report["twin"] == "timed"
    assert report["machine"]["torch"] == torch.__version__
    assert list(report["tasks"]) == ["training step", "text generation", "image generation",
                                     "cached text generation"]  # fmt: skip
    assert report["cached"].items() >= {"new": 40, "block": 32, "repeats": 1, "equal": 1.0}.items()
    for result in report["tasks"].values():
        assert result["ratio"] == result["twin"]["median"] / result["ours"]["median"] > 0
    shown = capsys.readouterr().out
    assert "RATIO" in shown and "40 new ones in blocks of 32" in shown


def test_benchmark_without_torch_and_optax(params, data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert benchmark.load_twin(params, CONFIG) == (None, "torch is missing, ours is timed alone")
    monkeypatch.setitem(sys.modules, "mmada_jax.train", None)
    monkeypatch.delattr(mmada_jax, "train", raising=False)
    tasks = {"training step": benchmark.training_step(CONFIG, data["train"])}
    result = benchmark.time_tasks({"ours": tasks}, repeats=2)["training step"]
    assert result.keys() == {"ours"}
    assert "our training step is gradient descent" in capsys.readouterr().out
