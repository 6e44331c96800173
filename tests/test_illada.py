"""Text models besides LLaDA: heads tied to the embedding, vocabularies and mask ids of their own."""

import json

import jax
import numpy as np
import pytest
from folders import call, expect_error, publish, same_bits
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mmada_jax.nets import transformer
from mmada_jax.serve.api import MMaDA
from mmada_jax.tokens.tokenizer import CONTROL, TextTokenizer
from mmada_jax.weights import hub, llada_keys
from mmada_jax.weights.folder import open_folder

TEXT = 300  # entries of the tokenizer
VALUES = {
    "model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
    "mlp_hidden_size": 48, "vocab_size": TEXT + 4, "embedding_size": TEXT + 4, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "max_sequence_length": 8192, "weight_tying": True,
    "bos_token_id": 1, "eos_token_id": [2, 3], "mask_token_id": 0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return published(tmp_path / "theirs")


def published(path, values=VALUES, head=False):
    """A folder as its authors might publish it."""
    config = llada_keys.config_from_hf(values)
    params = transformer.init_params(jax.random.key(0), config)
    state = llada_keys.params_to_torch(params, config)
    if head:
        state[llada_keys.HEAD] = state[llada_keys.EMBEDDING].copy()
    publish(path, state, values)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT, special_tokens=["[HIDDEN]", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    words = "all that is written here becomes tokens of a small vocabulary " * 9
    tokenizer.train_from_iterator([words, "then there are some more words, as many as it takes"], trainer)
    while tokenizer.get_vocab_size() < TEXT:
        tokenizer.add_tokens([AddedToken(f"word{tokenizer.get_vocab_size()}", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "mask_token": "[HIDDEN]"}))
    return path


def test_the_published_sizes():
    config = transformer.PRESETS["illada-8b"]
    outer = config.vocab * config.d_model
    assert round(transformer.param_count(config) / 1e9, 2) == 7.62  # its model card, 2026-06
    assert round((transformer.param_count(config) - outer) / 1e9, 2) == 6.98


def test_a_tied_head_is_the_embedding():
    config = llada_keys.config_from_hf(VALUES)
    params = transformer.init_params(jax.random.key(1), config)
    assert "head_DV" not in params
    untied = params | {"head_DV": params["embed_VD"].T}
    h_BLD = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    one, two = (transformer.unembed(p, config, h_BLD, 5, 100) for p in (params, untied))
    np.testing.assert_array_equal(one, two)
    assert jax.tree.structure(transformer.param_axes(config), is_leaf=lambda x: isinstance(x, tuple)) == (
        jax.tree.structure(params)
    )


def test_both_uses_of_a_tied_embedding_have_gradients():
    config = llada_keys.config_from_hf(VALUES, dtype="float32")
    params = transformer.init_params(jax.random.key(1), config)
    tokens_BL = np.arange(12).reshape(2, 6)

    def loss(looked_up, head):
        of = params | {"embed_VD": looked_up}
        h_BLD = transformer.hidden_states(of, config, tokens_BL, tokens_BL >= 0)
        logits = transformer.unembed({"head_DV": head.T} if head is not None else of, config, h_BLD)
        return (logits**2).sum()

    table = params["embed_VD"]
    together = jax.grad(lambda w: loss(w, None))(table)
    apart = jax.grad(loss, (0, 1))(table, table)
    np.testing.assert_allclose(together, apart[0] + apart[1], rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("head", [False, True])
def test_an_image_vocabulary_for_a_foreign_model(tmp_path, head):
    folder = published(tmp_path / "theirs", head=head)
    ours = tmp_path / "ours"
    assert call("from-torch", "--src", folder, "--dst", ours, "--add-image-vocab", 64) is None
    source = open_folder(ours)
    assert source.config.tied
    assert "head_DV" not in source.params
    assert "tokenizer_config.json" not in {path.name for path in ours.iterdir()}

    # Nine control tokens are new. Four rows of the embedding were free for them.
    tokenizer = source.tokenizer()
    vocab = tokenizer.vocab(64, source.config.vocab)
    assert (vocab.mask, vocab.bos, vocab.eos) == (0, 1, 2)
    assert vocab.image_offset == len(tokenizer) == TEXT + len(CONTROL) - 3
    assert source.config.vocab == vocab.image_offset + 64
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "all that is written [HIDDEN], <|mdm_mask|> and <s> too"
    kept = theirs.encode("all that is written", add_special_tokens=False).ids
    assert tokenizer.encode(text)[: len(kept)] == kept
    assert min(tokenizer.encode(text)) > 2
    assert tokenizer.decode(tokenizer.encode(text)) == text

    old = hub.read_tensors(folder)[llada_keys.EMBEDDING][:, :]
    new = np.asarray(source.params["embed_VD"][:, :])
    np.testing.assert_array_equal(new[: len(old)], old)
    np.testing.assert_allclose(new[len(old) :], np.tile(old.mean(0), (len(new) - len(old), 1)), atol=1e-7)
    assert MMaDA.load(ours).generate("that", max_new=4, block=4).ids.shape == (4,)


def test_there_and_back_with_its_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: bash launch/test.sh --all")
    transformers = pytest.importorskip("transformers")
    rows = dict.fromkeys(("vocab_size", "embedding_size"), TEXT + 12)  # room for the control tokens
    folder, ours, back = published(tmp_path / "theirs", VALUES | rows), tmp_path / "ours", tmp_path / "back"
    assert call("from-torch", "--src", folder, "--dst", ours) is None
    assert call("to-torch", "--src", ours, "--dst", back) is None
    same_bits(hub.read_tensors(back), hub.read_tensors(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back, trust_remote_code=True)
    assert theirs.get_output_embeddings() is theirs.get_input_embeddings()
    model, ids = MMaDA.load(ours, dtype="float32"), np.arange(20).reshape(2, 10) + 5
    h_BLD = transformer.hidden_states(model.params, model.config, ids, ids > 0)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(transformer.unembed(model.params, model.config, h_BLD), expected, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    assert (tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_what_does_not_fit(folder, tmp_path):
    out, more = tmp_path / "out", ["--add-image-vocab", "64"]
    config = folder / "config.json"
    config.write_text(json.dumps({**VALUES, "mask_token_id": None}))
    expect_error(folder, out, "'<|mdm_mask|>'", "mask_token_id is None", more=more)
    config.write_text(json.dumps({**VALUES, "mask_token_id": 5000}))
    expect_error(folder, out, "mask_token_id is 5000", more=more)
    config.write_text(json.dumps({**VALUES, "eos_token_id": "2"}))
    expect_error(folder, out, "eos_token_id of config.json is '2'; it must be an id", more=more)
    few = published(tmp_path / "few", VALUES | dict.fromkeys(("vocab_size", "embedding_size"), 200))
    expect_error(few, out, "300 entries, the embedding 200 rows", more=more)
    config.write_text(json.dumps({**VALUES, "weight_tying": "yes"}))
    expect_error(folder, out, "weight_tying", "'yes'", more=more)
    config.write_text(json.dumps({**VALUES, "weight_tying": False}))
    expect_error(folder, out, "missing", llada_keys.HEAD, more=more)
    state = {key: np.asarray(x) for key, x in hub.read_tensors(folder).items()}
    state[llada_keys.HEAD] = state[llada_keys.EMBEDDING] + 1
    other = publish(tmp_path / "other", state, VALUES)
    expect_error(other, out, f"{llada_keys.HEAD} isn't {llada_keys.EMBEDDING}", "weight_tying", more=more)


def test_a_tokenizer_with_gaps(folder, tmp_path):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["zz"] = TEXT + 50
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="gaps"):
        TextTokenizer.load(folder / "tokenizer.json", {"bos": 1, "eos": 2, "mask": 0})


@pytest.mark.parametrize(
    ("controls", "problem"),
    [
        ({"bos": 1, "eos": 1, "mask": 0}, "bos_token_id and eos_token_id of config.json are both 1"),
        ({"bos": 1, "eos": 2, "mask": 40}, "stands for texts"),
        ({"bos": 1, "eos": 2}, "mask_token_id is None"),
        ({"bos": 1, "eos": 2, "mask": 10}, "stands for texts"),
    ],
)
def test_control_ids_that_cannot_be(folder, controls, problem):
    values = json.loads((folder / "tokenizer.json").read_text())
    token = next(token for token, i in values["model"]["vocab"].items() if i == 40)
    values["model"]["merges"].append([token, token])
    values["model"]["vocab"][token * 2] = TEXT
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=problem):
        TextTokenizer.load(folder / "tokenizer.json", controls)


def test_a_string_of_ours_with_another_id_is_a_contradiction(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([CONTROL["eos"]])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"as {TEXT}, but eos_token_id of config.json is 2"):
        TextTokenizer.load(folder / "tokenizer.json", {"bos": 1, "eos": 2, "mask": 0})


def test_files_about_the_tokenizer_stay_if_no_token_was_renamed(folder, tmp_path):
    values = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(values).replace("[HIDDEN]", CONTROL["mask"]).replace('"<s>"', f'"{CONTROL["bos"]}"')
    text = text.replace('"</s>"', f'"{CONTROL["eos"]}"')
    (folder / "tokenizer.json").write_text(text)
    assert (
        call("from-torch", "--src", folder, "--dst", tmp_path / "ours", "--add-image-vocab", "64") is None
    )
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    assert open_folder(tmp_path / "ours").tokenizer().vocab(64).mask == 0
