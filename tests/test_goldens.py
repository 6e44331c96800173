"""Every number of tests/goldens (or of MMADA_GOLDENS) that the published PyTorch system computed."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_weights, load_golden

from mmada_jax.diffusion import corrupt, denoise, loss, rules, schedule
from mmada_jax.nets import transformer, vq
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import LLADA, SPECIAL_TOKENS, Vocab
from mmada_jax.train import optim
from mmada_jax.weights import llada_keys, magvit_keys

BACKBONES = ("backbone_mha", "backbone_gqa")
TEXT_RUNS = [(name, i) for name in BACKBONES for i in range(len(load_golden(name)[0]["C"]))]
IMAGE_RUNS = [(name, i) for name in BACKBONES for i in range(len(load_golden(name)[0]["D"]))]
INPAINT_STEPS = 6  # the one setting that goldens/README.md states and the json doesn't
PROMPTING = load_golden("prompting")[0]
SCHEDULES = load_golden("schedules")[0]


# --- the transformer -----------------------------------------------------------------------------


@functools.cache
def backbone(name):
    settings, arrays = load_golden(name)
    fields = settings["config"]
    config = transformer.ModelConfig(
        d_model=fields["d_model"],
        n_layers=fields["n_layers"],
        n_heads=fields["n_heads"],
        n_kv_heads=fields["n_kv_heads"],
        d_mlp=fields["mlp_hidden_size"],
        vocab=fields["embedding_size"],
        dtype="float32",
    )
    special = dict.fromkeys(SPECIAL_TOKENS, 0)
    special |= {"mask": fields["mask_token_id"], "eos": fields["eos_token_id"]}
    vocab = Vocab(fields["text_vocab"], fields["codebook"], rows=fields["embedding_size"], **special)
    return types.SimpleNamespace(
        fields=fields,
        settings=settings,
        arrays=arrays,
        config=config,
        vocab=vocab,
        params=llada_keys.params_from_torch(golden_weights(settings), config),
    )


@pytest.fixture(scope="module", params=BACKBONES)
def golden(request):
    return backbone(request.param)


@pytest.mark.parametrize("mask", ["full", "masked"])
def test_logits(golden, mask):
    ids = golden.arrays["A.input_ids"].astype(np.int32)
    valid = np.ones(ids.shape, bool) if mask == "full" else golden.arrays["A.attention_mask"] > 0
    h = jax.jit(transformer.hidden_states, static_argnums=1)(golden.params, golden.config, ids, valid)
    logits = np.asarray(transformer.unembed(golden.params, golden.config, h))
    expected = golden.arrays[f"A.logits_{mask}"]
    error = np.abs(logits - expected)[valid].max() / np.abs(expected[valid]).max()
    assert error < 1e-5


TASKS_IN_B = ("t2i", "lm", "mmu", "r2i")


def mixed_batch(golden, lm_per, coefficients):
    """Tokens, validity, targets and weights of the goldens' mixed batch, and each row's task."""
    a, counts = golden.arrays, golden.settings["B"]
    task = [layout.TASKS.index(name) for name in TASKS_IN_B]
    task = np.repeat(task, [counts[f"batch_{name}"] for name in TASKS_IN_B])
    ids, labels = a["B.input_ids"].astype(np.int32), a["B.labels"].astype(np.int32)
    is_t2i = task == layout.TASKS.index("t2i")
    valid = np.ones(ids.shape, bool)
    valid[is_t2i] = a["B.t2i_masks"] > 0
    scored = labels != -100
    scored[is_t2i, : counts["max_seq_length"] + 1] = False  # the text slot isn't scored
    hidden = scored & (ids == golden.vocab.mask)
    weights = corrupt.token_weights(
        hidden,
        scored & ~hidden,
        task,
        a["B.p_mask"][:, 0],
        a["B.answer_lengths"][:, 0].astype(np.int32),
        corrupt.LossConfig(lm_per=lm_per, **dict(zip(TASKS_IN_B, coefficients, strict=True))),
    )
    return (ids, valid, np.where(scored, labels, 0), weights), task


@functools.partial(jax.jit, static_argnums=1)
def losses(params, config, ids, valid, targets, weights):
    """The loss, and its share per row."""
    h = transformer.hidden_states(params, config, ids, valid)
    return loss.weighted_nll(h, params["head_DV"], targets, weights)


@pytest.mark.parametrize("pad", ["hard", "soft"])
def test_losses(golden, pad):
    kind = {"hard": "bool", "soft": "float"}[pad]
    config = dataclasses.replace(golden.config, pad=pad)
    for form, lm_per in (("losses", "answer"), ("losses_stage1", "token")):
        expected = golden.arrays[f"B.{form}_{kind}"]
        batch, task = mixed_batch(golden, lm_per, coefficients=(1.0,) * len(TASKS_IN_B))
        rows = np.asarray(losses(golden.params, config, *batch)[1])
        ours = [rows[task == layout.TASKS.index(name)].sum() for name in TASKS_IN_B]
        np.testing.assert_allclose(ours[: len(expected)], expected, rtol=1e-4, err_msg=form)


def test_gradients(golden):
    batch, _ = mixed_batch(golden, "answer", golden.arrays["B.total_coeffs"].tolist())

    @jax.jit
    @jax.grad
    def gradients(params):
        return losses(params, golden.config, *batch)[0]

    grads = llada_keys.params_to_torch(gradients(golden.params), golden.config)
    norms = {key[12:]: v for key, v in golden.arrays.items() if key.startswith("B.grad_norm.")}
    assert norms
    for key, norm in norms.items():
        np.testing.assert_allclose(np.linalg.norm(grads[key]), norm, rtol=1e-4, err_msg=key)
    full = {key[7:]: v for key, v in golden.arrays.items() if key.startswith("B.grad.")}
    assert full
    for key, expected in full.items():
        error = np.abs(grads[f"model.transformer.{key}.weight"] - expected).max()
        assert error < 1e-4 * np.abs(expected).max(), key


# --- decoding ------------------------------------------------------------------------------------


def decode(golden, ids, valid, start, length, rule, unconditional=None):
    @jax.jit
    def run(params):
        return denoise.denoise(
            transformer.Network(params, golden.config),
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(valid, bool),
            start=start,
            length=length,
            rule=rule,
            vocab=golden.vocab,
            key=jax.random.key(0),
            unconditional=unconditional,
        )

    return np.asarray(run(golden.params))


@pytest.mark.parametrize(("name", "i"), TEXT_RUNS)
def test_text_generation(name, i):
    golden, run = backbone(name), backbone(name).settings["C"][i]
    prompt = golden.arrays["C.prompt"]
    masks = np.full((len(prompt), run["gen_length"]), golden.vocab.mask)
    ids = np.concatenate([prompt, masks], axis=1)
    valid = golden.arrays["C.attention_mask"] if run["attention_mask"] else np.ones(ids.shape)
    rule = rules.TextRule(
        steps=run["steps"],
        block=run["block_length"],
        temperature=run["temperature"],
        remask=run["remasking"],
        guidance=run["cfg_scale"],
    )
    ours = decode(golden, ids, valid, prompt.shape[1], run["gen_length"], rule)
    np.testing.assert_array_equal(ours, golden.arrays[f"C.{i}.output"])


def test_transfer_quota(golden):
    masks = golden.arrays["C.transfer.mask"].sum(axis=1, dtype=np.int32)
    (name,) = (key for key in golden.arrays if key.startswith("C.transfer.steps"))
    expected = golden.arrays[name]
    steps = expected.shape[1]
    ours = [rules.transfer_quota(masks, steps, np.int32(step)) for step in range(steps)]
    np.testing.assert_array_equal(np.stack(ours, axis=1), expected)


@pytest.mark.parametrize(("name", "i"), IMAGE_RUNS)
def test_image_generation(name, i):
    golden, run = backbone(name), backbone(name).settings["D"][i]
    a, n = golden.arrays, golden.fields["n_img"]
    rule = rules.ImageRule(
        steps=run["timesteps"],
        schedule=run["schedule"],
        temperature=run["temperature"],
        guidance=run["guidance_scale"],
        draw=run["draw"],
    )
    other = jnp.asarray(a["D.uncond_input_ids"], jnp.int32), a["D.uncond_attention_mask"] > 0
    ids = a["D.input_ids"]
    start = ids.shape[1] - 1 - n
    ours = decode(golden, ids, a["D.attention_mask"], start, n, rule, other)
    codes = golden.vocab.image_codes(ours[:, start:-1])
    np.testing.assert_array_equal(codes, a[f"D.{i}.codes"])


def test_inpainting(golden):
    a, n = golden.arrays, golden.fields["n_img"]
    ids, given = a["D.inpaint.input_ids"], a["D.inpaint.given"]
    start = ids.shape[1] - 1 - n
    rule = rules.ImageRule(steps=INPAINT_STEPS, temperature=0, guidance=0, draw="argmax")
    ours = decode(golden, ids, a["D.attention_mask"], start, n, rule)
    codes = golden.vocab.image_codes(ours[:, start:-1])
    np.testing.assert_array_equal(codes, a["D.inpaint.codes"])
    np.testing.assert_array_equal(codes[given >= 0], given[given >= 0])


# --- the image tokenizer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    settings, arrays = load_golden("magvit")
    encoder, decoder = settings["config"]["encoder"], settings["config"]["decoder"]
    config = vq.VQConfig(
        channels=encoder["ch"],
        encoder_mult=tuple(encoder["ch_mult"]),
        encoder_blocks=tuple(encoder["num_res_blocks"]),
        decoder_mult=tuple(decoder["ch_mult"]),
        decoder_blocks=tuple(decoder["num_res_blocks"]),
        bits=settings["config"]["bits"],
        pixel_channels=arrays["pixels"].shape[1],
    )
    return arrays, config, magvit_keys.params_from_torch(golden_weights(settings), config)


def test_encoder(tokenizer):
    arrays, config, params = tokenizer
    pixels = arrays["pixels"].transpose(0, 2, 3, 1)
    expected = arrays["encoder_out"].transpose(0, 2, 3, 1)
    latents = jax.jit(vq.latents, static_argnums=1)(params, config, pixels)
    assert np.abs(latents - expected).max() < 1e-5 * np.abs(expected).max()
    # A bit may differ only where its latent is next to zero.
    bits = vq.dequantize(vq.quantize(latents), config.bits)
    theirs = vq.dequantize(arrays["codes"].reshape(expected.shape[:-1]).astype(np.int32), config.bits)
    assert np.all((bits == theirs) | (np.abs(expected) < 1e-4))


def test_dequantizer(tokenizer):
    arrays, config, _ = tokenizer
    z = arrays["z_q"].transpose(0, 2, 3, 1)
    codes = arrays["codes"].reshape(z.shape[:-1]).astype(np.int32)
    np.testing.assert_array_equal(vq.dequantize(codes, config.bits), z)
    np.testing.assert_array_equal(vq.quantize(z), codes)


def test_decoder(tokenizer):
    arrays, config, params = tokenizer
    expected = arrays["reconstruction"].transpose(0, 2, 3, 1)
    codes = arrays["codes"].reshape(arrays["z_q"][:, 0].shape).astype(np.int32)
    pixels = jax.jit(vq.decode, static_argnums=1)(params, config, codes)
    assert np.abs(pixels - expected).max() < 1e-5 * np.abs(expected).max()


def test_keys_of_the_full_size_tokenizer():
    expected = load_golden("magvitv2_state_dict_shapes")[0]
    config = vq.VQConfig()
    ours = {key: rule.torch_shape for key, rule in magvit_keys.key_table(config).items()}
    ours["quantize.embedding"] = (config.codebook_size, config.bits)
    ours["quantize.power_vals"] = (config.bits,)
    assert ours == {key: tuple(shape) for key, shape in expected.items()}


# --- rows of every task --------------------------------------------------------------------------


def ids_of(text):
    return [int(word) for word in text.split()]


def prompt_case(name):
    """The golden's lists by name, our rows for the same input, and the vocabulary."""
    headers = {key.strip("<|>"): id for key, id in PROMPTING["tokens"].items()}
    vocab = dataclasses.replace(
        LLADA,
        bos=PROMPTING["bos"],
        eos=PROMPTING["eos"],
        start_header=headers["start_header_id"],
        end_header=headers["end_header_id"],
        end_turn=headers["eot_id"],
    )
    task, inputs, max_text = name, PROMPTING["inputs"], PROMPTING["max_text_len"]
    if task.split("_")[-1].isdigit():
        task, _, length = task.rpartition("_")
    long, task = task.endswith("_long"), task.removesuffix("_long")
    plain = task in ("t2i", "t2i_gen", "lm")
    texts = inputs["texts" if plain else "chat_long" if long else "chat"]
    texts, images = [ids_of(t) for t in texts], PROMPTING["image_ids"]
    if task in ("t2i", "t2i_gen"):
        rows = [layout.t2i(vocab, *pair, max_text) for pair in zip(texts, images, strict=True)]
    elif task in ("lm", "lm_chat"):
        rows = [getattr(layout, task)(vocab, text, int(length)) for text in texts]
    elif task == "mmu":
        rows = [layout.mmu(vocab, *pair, max_text) for pair in zip(images, texts, strict=True)]
    else:
        rows = [layout.r2i(vocab, *pair, max_text) for pair in zip(texts, images, strict=True)]
    lists = map(np.array, PROMPTING[name])
    return dict(zip(PROMPTING["order"][task], lists, strict=True)), layout.stack(rows), vocab


PROMPT_CASES = [
    name for name in PROMPTING if name.startswith(("t2i", "lm", "mmu", "r2i")) and name != "order"
]


@pytest.mark.parametrize("name", PROMPT_CASES)
def test_prompt_ids_and_masks(name):
    expected, batch, _ = prompt_case(name)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    if "attention_mask" in expected:
        np.testing.assert_array_equal(batch.valid, expected["attention_mask"])
    else:
        np.testing.assert_array_equal(~batch.target, expected["prompt_mask"])
        assert batch.valid.all()


@pytest.mark.parametrize("name", [name for name in PROMPT_CASES if "gen" not in name])
def test_prompt_labels(name):
    expected, batch, _ = prompt_case(name)
    labels = expected["labels"]
    ours = batch.tokens.copy()
    if name.startswith("t2i"):
        # The image's labels are those of the noise; what is labelled before soi is never scored.
        ours[batch.target] = np.ravel(PROMPTING["image_labels"])
        ours[~batch.valid] = -100
        scored = np.arange(ours.shape[1]) > PROMPTING["max_text_len"]
        np.testing.assert_array_equal(batch.target | batch.shown, np.tile(scored, (len(ours), 1)))
    elif name.startswith("mmu"):
        ours[:, : ours.shape[1] - PROMPTING["max_text_len"]] = -100  # the image and its brackets
    np.testing.assert_array_equal(ours, labels)
    assert (labels[batch.target] != -100).all() or name.startswith("t2i")


def test_generation_rows_hide_the_image():
    expected, batch, vocab = prompt_case("t2i_gen")
    n, max_text = len(PROMPTING["image_ids"][0]), PROMPTING["max_text_len"]
    tested = 0
    for i, text in enumerate(map(ids_of, PROMPTING["inputs"]["texts"])):
        if len(text) + 2 <= max_text:
            row = layout.t2i_generation(vocab, text, n, max_text)
            hidden = np.where(batch.target[i], vocab.mask, expected["input_ids"][i])
            np.testing.assert_array_equal(row.tokens, hidden)
            np.testing.assert_array_equal(row.valid, expected["attention_mask"][i])
            tested += 1
        else:
            with pytest.raises(ValueError, match="limit is"):
                layout.t2i_generation(vocab, text, n, max_text)
    assert tested


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [key[5:] for key in SCHEDULES if key.startswith("mask.")])
@pytest.mark.parametrize("xp", [np, jnp])
def test_mask_schedule(name, xp):
    ours = schedule.named(name)(xp.asarray(SCHEDULES["t"], xp.float32))
    np.testing.assert_allclose(ours, SCHEDULES[f"mask.{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [key for key in SCHEDULES if key.startswith("lr.cosine")])
def test_learning_rate_factors(name):
    # The reference ignores min_lr_scale: each of its lists decays to zero.
    expected = np.array(SCHEDULES[name])
    steps, warmup = len(expected), int(np.argmax(expected))
    ours = [optim.cosine_factor(np.int32(step), steps, warmup, 0.0) for step in range(steps)]
    np.testing.assert_allclose(np.array(ours), expected, atol=1e-6, rtol=0)
