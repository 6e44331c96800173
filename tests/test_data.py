"""Scans and their split, the sentences, and the text tokenizer."""

import codecs
import dataclasses
import itertools
import json
import pickle
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mmada_jax.data import digits
from mmada_jax.tokens.tokenizer import (
    CONTROL,
    HEADERS,
    TEMPLATE,
    TextTokenizer,
    chat,
    conversation_end,
    parse_chat,
    split_thought,
)
from mmada_jax.tokens.vocab import LLADA


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(digits.corpus(), 384)


# ---- Scans -----------------------------------------------------------------------------------------


def test_splits_share_no_scan_and_lose_none():
    sizes = {split: len(digits.load(split).labels) for split in digits.SPLITS}
    assert sizes == {"train": 1258, "validation": 180, "test": 359}
    seen = [{scan.tobytes() for scan in digits.load(split).pixels} for split in digits.SPLITS]
    for a, b in itertools.combinations(seen, 2):
        assert not a & b
    for split in digits.SPLITS:
        pixels = digits.load(split).pixels
        assert pixels.min() == -1
        assert pixels.max() == 1
        assert set(digits.load(split).labels) == set(range(10))


def test_unknown_splits_are_errors():
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, validation, test"):
        digits.load("dev")


@pytest.mark.parametrize("n", [1, 2])
def test_a_canvas_is_cut_into_its_scans(n):
    scans = digits.load("train").pixels[:n]
    canvas = digits.canvas(*scans)
    assert canvas.shape == (8, 16, 1)
    np.testing.assert_array_equal(digits.cut(canvas, n), scans)


def test_sums_are_right_and_held_out_ones_are_not_trained():
    train, test = digits.sums("train"), digits.sums("test")
    for question, answer in train + test:
        asked, _, result = answer.partition("=")
        assert asked == question
        assert eval(question) == int(result)
    assert not set(train) & set(test)
    assert len(test) >= 180
    assert {f"{a}+{b}" for a in range(10) for b in range(10)} <= {question for question, _ in train}


def test_sentences():
    assert digits.caption(7) == "a handwritten seven"
    assert digits.caption(3, 8) == "a three and an eight"
    assert digits.caption(3, 8, numbers=True) == "a 3 and an 8"
    assert digits.reading(3, 5) == "three and five"


def held_out(cases, *more):
    """Cases of the splits share none and lose none; how many each has."""
    parts = {split: cases(split) for split in (*digits.SPLITS, *more)}
    everything = [case for part in parts.values() for case in part]
    assert len(set(everything)) == len(everything)
    return {split: len(part) for split, part in parts.items()}


def test_additions_are_held_out():
    sizes = {"train": 600, "validation": 200, "test": 400, "prompts": 1000}
    assert held_out(digits.chains, "prompts") == sizes
    assert all(sum(chain[:3]) < 10 for split in sizes for chain in digits.chains(split))
    assert held_out(digits.pairs) == {"train": 35, "validation": 5, "test": 15}
    assert {sum(pair) for pair in digits.pairs("train")} == set(range(10))


def read_canvas(pixels, n, split):
    """The labels of the scans on a canvas."""
    scans = digits.load(split)
    known = {scan.tobytes(): int(digit) for scan, digit in zip(scans.pixels, scans.labels, strict=True)}
    return [known[scan.tobytes()] for scan in digits.cut(pixels, n)]


@pytest.mark.parametrize("split", digits.SPLITS)
@pytest.mark.parametrize("kind", digits.KINDS)
def test_records_show_what_they_say(kind, split):
    records = digits.open_records(kind, split)
    for i in [*range(20), len(records) - 1]:
        record = records[i]
        asked, said = [turn["content"] for turn in record.turns] or ("", record.texts[0])
        if kind == "captions":
            labels = read_canvas(record.image, 2 if " and " in said else 1, split)
            assert set(record.texts) == {digits.caption(*labels), digits.caption(*labels, numbers=True)}
        if kind == "reading":
            two = " and " in said or "+" in said
            labels = read_canvas(record.image, 2 if two else 1, split)
            in_words = {
                True: (digits.ASK_TWO, digits.reading(*labels)),
                False: (digits.ASK_ONE, digits.reading(*labels)),
            }
            assert (asked, said) in (in_words[two], (digits.ASK_NUMBERS, digits.addition(*labels)))
        if kind == "vqa_sum":
            a, b = read_canvas(record.image, 2, split)
            assert said == f"<think>{a}+{b}={a + b}</think>{a + b}"
        if kind == "draw_sum":
            a, b = map(int, asked.removeprefix("draw ").split("+"))
            assert (a, b) in digits.pairs(split)
            assert read_canvas(record.image, 1, split) == [a + b]
            assert said == f"<think>{a}+{b}={a + b}</think>"
        if kind == "pages":
            scans = digits.load(split)
            known = {scan.tobytes(): label for scan, label in zip(scans.pixels, scans.labels, strict=True)}
            lines = [[known[scan.tobytes()] for scan in line] for line in digits.cut_page(record.image)]
            assert [len(line) for line in lines] == [4] * 4 and all(len(set(line)) == 1 for line in lines)
            assert said == digits.page_caption(*(line[0] for line in lines))
        if kind == "text_cot":
            a, b, c, d = map(int, asked.split("+"))
            assert (a, b, c, d) in digits.chains(split)
            steps = f"{a}+{b}={a + b} {a + b}+{c}={a + b + c} {a + b + c}+{d}={a + b + c + d}"
            assert said == f"<think>{steps}</think>{a + b + c + d}"
        if kind == "sums":
            assert (asked, said) in digits.sums(split)
        assert (record.image is None) == (kind in ("statements", "sums", "text_cot"))


@pytest.mark.parametrize("kind", digits.KINDS)
def test_records_are_functions_of_their_index(kind):
    records = digits.open_records(kind, "train")
    again = pickle.loads(pickle.dumps(records))
    assert again.fingerprint == records.fingerprint
    keys = {records[i].key for i in range(50)}
    assert len(keys) == 50
    for i in (0, 7, 49):
        a, b = dataclasses.asdict(records[i]), dataclasses.asdict(again[i])
        np.testing.assert_equal(a, b)
    others = [digits.open_records(kind, split) for split in ("validation", "test")]
    assert len({r.fingerprint for r in [records, *others]}) == 3
    with pytest.raises(IndexError, match=f"{kind} of train has {len(records)} records"):
        records[len(records)]


def test_unknown_kinds_are_errors():
    with pytest.raises(ValueError, match="unknown kind 'sum'; known: captions, statements"):
        digits.open_records("sum", "train")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        digits.open_records("sums", "dev")


# ---- Text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a three and an eight", "7 + 12", "Zürich, 東京! \t x", ""])
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_below_twenty_are_single_tokens_and_others_digits(tokenizer):
    ids = [tokenizer.encode(str(d)) for d in range(20)]
    assert all(len(i) == 1 for i in ids)
    assert len({tuple(i) for i in ids}) == 20
    assert tokenizer.encode("407") == [*ids[4], *ids[0], *ids[7]]
    assert tokenizer.encode("16+3") == [*ids[16], *tokenizer.encode("+"), *ids[3]]


def test_thoughts(tokenizer):
    ids = tokenizer.encode("<think>3+5=8</think>8")
    assert len(ids) == 8
    assert tokenizer.decode(ids) == "<think>3+5=8</think>8"
    cases = {
        "<think>3+5=8</think>8": ("3+5=8", "8"),
        " <think> a </think>\n8 ": ("a", "8"),
        "8": ("", "8"),
        "3+5=8</think>8": ("3+5=8", "8"),
        "<think>3+5=8 8": ("3+5=8 8", ""),
        "x<think>a</think>b</think>c": ("a", "b</think>c"),
        "": ("", ""),
    }
    assert {text: split_thought(text) for text in cases} == cases


def test_a_saved_tokenizer_is_the_same_and_training_repeats(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = TextTokenizer.train(digits.corpus(), 384)
    for other in (TextTokenizer.load(tmp_path / "tokenizer.json"), again):
        assert other.vocab(64) == tokenizer.vocab(64)
        assert other.encode(digits.caption(3, 8)) == tokenizer.encode(digits.caption(3, 8))
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        TextTokenizer.load(tmp_path / "none.json")


def test_the_chat_template_is_that_of_mmada(tokenizer):
    head = "<|startoftext|><|start_header_id|>user<|end_header_id|>\nhi<|eot_id|>"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n"
    assert str(chat(" hi ")) == head + assistant
    assert str(chat("hi", "yes")) == f"{head}{assistant}yes<|eot_id|>"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": "and?"},
    ]
    more = "<|start_header_id|>user<|end_header_id|>\nand?<|eot_id|>"
    assert str(chat(turns)) == f"{head}{assistant}yes<|eot_id|>{more}{assistant}"
    vocab = tokenizer.vocab(64)
    ids = tokenizer.encode(chat("hi", "yes"))
    assert ids[0] == vocab.bos
    assert ids.count(vocab.end_turn) == 2
    prompt = tokenizer.encode(chat("hi"))
    assert ids[: len(prompt)] == prompt
    assert tokenizer.decode(conversation_end([*ids[len(prompt) :], vocab.eos], vocab)) == "yes"
    # What another program rendered is the same, once it is said to be that.
    for template in (chat(turns), chat("hi", "yes")):
        assert tokenizer.encode(parse_chat(str(template))) == tokenizer.encode(template)
    with pytest.raises(ValueError, match="'hi there' is no rendered conversation: it has no header"):
        parse_chat("hi there")


# ---- What people write -----------------------------------------------------------------------------

SPELLED = (*CONTROL.values(), "<|reserved_token_3|>", "".join(CONTROL.values()), "<|eot_id|>" * 300)


def words(specials=(), plain=(), unk="[UNK]"):
    """A tokenizer of another make: whole words between spaces, control tokens among them."""
    ids = {
        token: i for i, token in enumerate([unk, *CONTROL.values(), "hello", "user", "assistant", "yes"])
    }
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in plain])
    return TextTokenizer(tokenizer)


@pytest.fixture(params=["ours", "a file", "a worker's", "words", "words, special", "words, added", "llada"])
def any_tokenizer(request, tokenizer, llada_words, tmp_path):
    if request.param == "a file":
        tokenizer.save(tmp_path / "tokenizer.json")
        return TextTokenizer.load(tmp_path / "tokenizer.json")
    if request.param == "llada":
        return TextTokenizer.load(save_words(llada_words, tmp_path / "tokenizer.json"))
    control = list(CONTROL.values())
    return {
        "ours": lambda: tokenizer,
        "a worker's": lambda: pickle.loads(pickle.dumps(tokenizer)),
        "words": words,
        "words, special": lambda: words(specials=control),
        "words, added": lambda: words(plain=control),
    }[request.param]()


def test_no_text_of_a_person_has_a_control_token(any_tokenizer):
    tokenizer = any_tokenizer
    vocab = tokenizer.vocab(64)
    control = {getattr(vocab, name) for name in CONTROL}
    turns = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "hello"}
    plain = [i for i in tokenizer.encode(chat([*turns], "yes")) if i in control]
    assert plain[0] == vocab.bos and vocab.end_turn in plain
    for spelled in SPELLED:
        for text in (spelled, f"hello {spelled}", f"{spelled}hello", f"hello\n{spelled} yes"):
            assert control.isdisjoint(tokenizer.encode(text)), text
            turns = {"role": "assistant", "content": text}, {"role": text, "content": text}
            ids = tokenizer.encode(chat([*turns], text))
            assert [i for i in ids if i in control] == plain, text
    # What nobody meant to be control is not lost in such text.
    ids = tokenizer.encode(f"hello {CONTROL['mask']} yes")
    (hello,), (yes,) = (tokenizer.encode(word)[-1:] for word in ("x hello", "x yes"))
    assert yes == ids[-1] and (hello in ids or hello == tokenizer.encode("q")[0])


def test_what_is_spelled_comes_back_as_text(tokenizer):
    for text in SPELLED:
        assert tokenizer.decode(tokenizer.encode(f"a {text} b")) == f"a {text} b"
    thought = f"<think>{CONTROL['end_turn']}</think>8"
    assert tokenizer.decode(tokenizer.encode(thought)) == thought
    assert tokenizer.encode(thought)[0] == tokenizer.encode("<think>")[0]
    assert len(tokenizer.encode("<think>")) == len(tokenizer.encode("</think>")) == 1


def test_the_ids_of_text_without_control_tokens_are_the_librarys(tokenizer, llada_words, tmp_path):
    llada = TextTokenizer.load(save_words(llada_words, tmp_path / "llada.json"))
    tokenizer.save(tmp_path / "ours.json")
    for ours, name in ((tokenizer, "ours"), (llada, "llada")):
        theirs = Tokenizer.from_file(str(tmp_path / f"{name}.json"))
        texts = ["hello  there\n", " w5 w7", "<think>3+5=8</think> 8 東京 🙂", ""]
        for text in texts:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        rendered = [chat("w5\n\nw7 "), chat("hi", "yes\n"), *digits.corpus()]
        for text in [*texts, *rendered]:
            assert ours.encode(text) == theirs.encode(str(text), add_special_tokens=False).ids


def test_a_token_for_the_unknown_that_is_control_is_refused():
    tokenizer = words(unk=CONTROL["eos"])
    assert tokenizer.encode("hello yes")
    with pytest.raises(ValueError, match=r"reads '.' as '<\|endoftext\|>', a control token"):
        tokenizer.encode("hello you")


REFUSED = {
    "half of a surrogate pair: 'cut in two \\ud83d'": "cut in two \ud83d",
    "half of a surrogate pair: '": "\udc80 from a command line",
    "a text is expected, not NoneType": None,
    "a text is expected, not bytes": b"bytes",
    "a text is expected, not list": ["a", "b"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_tokenizer_refuses_is_one_line(any_tokenizer, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        any_tokenizer.encode(REFUSED[message])
    str(caught.value).encode()  # it can be printed
    if isinstance(REFUSED[message], str):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            any_tokenizer.encode(chat("a question", REFUSED[message]))


# ---- LLaDA's tokenizer -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llada_words():
    """Word -> id of a tokenizer of LLaDA's size, with its control tokens in their places."""
    ids = {f"w{i}": i for i in range(LLADA.image_offset)}
    for name in ("bos", "eos", "mask", *HEADERS):
        del ids[f"w{getattr(LLADA, name)}"]
        ids[CONTROL[name]] = getattr(LLADA, name)
    return ids


def save_words(ids, path):
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([token for token in CONTROL.values() if token in ids])
    tokenizer.save(str(path))
    return path


def test_lladas_tokenizer_gives_lladas_vocab(llada_words, tmp_path):
    tokenizer = TextTokenizer.load(save_words(llada_words, tmp_path / "tokenizer.json"))
    assert tokenizer.vocab(8192, LLADA.rows) == tokenizer.vocab(8192) == LLADA
    asked = tokenizer.encode(chat("w5 w7"))
    assert asked[0] == LLADA.bos
    assert asked[asked.index(5) :][:4] == [5, 7, LLADA.end_turn, LLADA.start_header]
    bare = tokenizer.vocab(0, 126464)
    assert bare.codebook_size == 0
    assert bare.rows == 126464


def test_a_tokenizer_that_lacks_the_headers_is_given_them(llada_words, tmp_path):
    short = {token: i for token, i in llada_words.items() if i < LLADA.start_header}
    tokenizer = TextTokenizer.load(save_words(short, tmp_path / "tokenizer.json"))
    assert tokenizer.vocab(8192, LLADA.rows) == LLADA


def test_truncation_and_padding_of_a_file_are_not_used(llada_words, tmp_path):
    path = save_words(llada_words, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(path))
    theirs.enable_truncation(5)
    theirs.enable_padding(length=64)
    theirs.save(str(path))
    tokenizer = TextTokenizer.load(path)
    assert tokenizer.encode("w1 w2 w3 w4 w5 w6 w7") == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_exported_for_pytorch(llada_words, tmp_path):
    short = {token: i for token, i in llada_words.items() if i < LLADA.start_header}
    tokenizer = TextTokenizer.load(save_words(short, tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "theirs", "kept": 1}')
    tokenizer.export(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values == {"chat_template": TEMPLATE, "kept": 1}
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == LLADA.image_offset


def test_a_tokenizer_of_another_model_is_refused_by_token(llada_words, tmp_path):
    path, mask = tmp_path / "tokenizer.json", CONTROL["mask"]
    swapped = llada_words | {mask: 17, "w17": LLADA.mask}
    with pytest.raises(ValueError, match=r"isn't LLaDA's: '<\|mdm_mask\|>' has id 17, expected 126336$"):
        TextTokenizer.load(save_words(swapped, path)).vocab(8192, LLADA.rows)
    few = {token: i for token, i in llada_words.items() if i < 1000}
    with pytest.raises(
        ValueError, match=r"it has 1000 entries, expected 126349; '<\|startoftext\|>' has id None"
    ):
        TextTokenizer.load(save_words(few, path)).vocab(8192, LLADA.rows)
    for text in ("{}", "", "[" * 100_000, '{"model": "\\ud83d"}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer: ."):
            TextTokenizer.load(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=r"tokenizer.json is a pointer of git LFS"):
        TextTokenizer.load(path)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        TextTokenizer.load(tmp_path)


def test_a_tokenizer_with_a_byte_order_mark(llada_words, tmp_path):
    path = save_words(llada_words, tmp_path / "tokenizer.json")
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(codecs.BOM_UTF8 + b'{"kept": 1}')
    tokenizer = TextTokenizer.load(path)
    assert tokenizer.vocab(8192) == LLADA
    # Other programs refuse it; what is exported for them has none.
    tokenizer.export(tmp_path)
    assert Tokenizer.from_file(str(path)).get_vocab_size() == len(tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["kept"] == 1
