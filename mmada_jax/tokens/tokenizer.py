"""The text tokenizer: training a small BPE, loading a tokenizer.json, the chat template, and the Vocab.

Text comes in two types. A `str` is written by people: it never becomes a control token, whatever it
spells. A `Template` is rendered by this project: it has control tokens by name, and texts of people
between them. How token ids become the row of a task is in layout.py.
"""

import codecs
import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmada_jax import files, storage
from mmada_jax.tokens.vocab import LLADA, SPECIAL_TOKENS, Vocab

# The strings of the control tokens in a tokenizer that was trained here. LLaDA's tokenizer has the first
# six of them, or the first three, and HEADERS are added to it. For RESERVED it has ids under other
# strings, which MMaDA uses by number.
CONTROL = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "mask": "<|mdm_mask|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "end_turn": "<|eot_id|>",
    "pad": "[iPAD]",
    "soi": "<|soi|>",
    "eoi": "<|eoi|>",
    "t2i": "<|t2i|>",
    "mmu": "<|mmu|>",
    "r2i": "<|r2i|>",
}
HEADERS = ("start_header", "end_header", "end_turn")
RESERVED = ("pad", "soi", "eoi", "t2i", "mmu", "r2i")
THINK, END_THINK = "<think>", "</think>"

# The template of `chat` as Jinja, for programs that render conversations themselves.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}<|startoftext|>{% endif %}<|start_header_id|>"
    "{{ message['role'] }}<|end_header_id|>\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\\n' }}"
)


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token by its name, a key of CONTROL."""

    name: str


@dataclasses.dataclass(frozen=True)
class Template:
    """A rendered conversation: control tokens, and texts of people between them. In these texts the string
    of a control token is ordinary text. `str(template)` is the conversation for other programs."""

    parts: tuple[Control | str, ...]

    def __str__(self) -> str:
        return "".join(CONTROL[part.name] if isinstance(part, Control) else part for part in self.parts)


class TextTokenizer:
    """Text <-> ids. Control tokens come from templates alone, and are never decoded."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # so the library reads their strings as ordinary text
        self._controls = {i: name for name, i in self._control_ids().items() if i is not None}

    def __getstate__(self) -> str:
        return self._tokenizer.to_str()  # encode_special_tokens isn't in it: __init__ sets it again

    def __setstate__(self, state: str) -> None:
        self.__init__(Tokenizer.from_str(state))

    @classmethod
    def train(cls, corpus: Iterable[str | Template], size: int) -> "TextTokenizer":
        """A byte-level BPE of at most `size` ids, the control tokens first, <think> and </think> last.

        Numbers below twenty that are in the corpus become single tokens; larger numbers are read digit by
        digit. Raises ValueError if `size` has no room for the bytes and the control tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + len(SPECIAL_TOKENS) + 2
        if size < least:
            raise ValueError(
                f"a text tokenizer of {size} ids has no room for all bytes and the control tokens; "
                f"text_vocab must be at least {least}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"1\d|\d|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - 2,
            special_tokens=[CONTROL[name] for name in SPECIAL_TOKENS],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(str, corpus), trainer)
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in (THINK, END_THINK)])
        return cls(tokenizer)

    @classmethod
    def load(cls, path: storage.Name, controls: Mapping[str, int] | None = None) -> "TextTokenizer":
        """Reads a tokenizer.json, with a byte order mark or without. If it is LLaDA's and lacks the three
        tokens of the chat template (HEADERS), they are added, as MMaDA does.

        Another model's tokenizer is given our control tokens, if `controls` has the ids of its "bos", "eos"
        and "mask": these get our strings, and what else it lacks of CONTROL is added behind its ids.

        Raises FileNotFoundError, or ValueError for a file that holds no tokenizer."""
        if not storage.path(path).exists():
            raise FileNotFoundError(f"no tokenizer at {path}")
        tokenizer = read_tokenizer(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.get_vocab_size() == LLADA.start_header:
            tokenizer.add_special_tokens([AddedToken(CONTROL[name], special=True) for name in HEADERS])
        elif controls and tokenizer.get_vocab_size() != LLADA.image_offset:
            tokenizer = _adopted(tokenizer, controls, path)
        return cls(tokenizer)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, path: storage.Name) -> None:
        """Writes a tokenizer.json, whole or not at all."""
        storage.write_whole(path, self.to_json())

    def encode(self, text: str | Template) -> list[int]:
        """Text -> ids. No id is added at the ends.

        The ids of a `str` have no control tokens, whatever it spells; those of a template have the control
        tokens that it names. Raises ValueError for a text that is no Unicode (half of a surrogate pair),
        and for a text that the tokenizer refuses.
        """
        if not isinstance(text, Template):
            return self._encode(text)
        ids = []
        for is_text, parts in itertools.groupby(text.parts, lambda part: isinstance(part, str)):
            if is_text:
                ids += self._encode("".join(parts))
            else:
                ids += map(self._id, parts)
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            # A panic of the library is raised as a BaseException that isn't an Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(_why_refused(text, error)) from error
        ids, controls = encoding.ids, self._controls
        if controls.keys().isdisjoint(ids):
            return ids
        # The text spells a control token that tokenizer.json doesn't mark as special, or has as a word. Its
        # string isn't found any more if the text is cut behind the first character of that string.
        spans = [(i, *span) for i, span in zip(ids, encoding.offsets, strict=True) if i in controls]
        for i, start, end in spans:
            if end - start < 2:
                raise ValueError(
                    f"the tokenizer reads {text[start:end]!r} as {CONTROL[controls[i]]!r}, a control token "
                    "that no text may hold; it needs another token for what it doesn't know"
                )
        cuts = [0, *(start + 1 for _, start, _ in spans), len(text)]
        return [i for start, end in itertools.pairwise(cuts) for i in self._encode(text[start:end])]

    def _id(self, control: Control) -> int:
        found = self._tokenizer.token_to_id(CONTROL[control.name])
        if found is None:
            raise ValueError(f"the tokenizer lacks the control token {CONTROL[control.name]}")
        return found

    def _control_ids(self) -> dict[str, int | None]:
        """Name of a control token -> its id. LLaDA's tokenizer has no strings for some of them (RESERVED);
        their ids are those of `vocab.LLADA`."""
        ids = {name: self._tokenizer.token_to_id(token) for name, token in CONTROL.items()}
        if len(self) == LLADA.image_offset and any(ids[name] is None for name in RESERVED):
            ids |= {name: getattr(LLADA, name) for name in RESERVED}
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text. Control tokens and ids beyond the text tokenizer are left out."""
        known = [int(i) for i in ids if i < len(self)]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def vocab(self, codebook_size: int, rows: int | None = None) -> Vocab:
        """The flat vocabulary of this tokenizer and an image codebook.

        `rows` is the number of embedding rows. By default it is the number of ids, rounded up to a multiple
        of 64; with LLaDA's tokenizer it is MMaDA's 134656 at least. A tokenizer that was trained here has
        all control tokens. Any other must be LLaDA's, with 126349 entries and the control tokens at the
        ids of `vocab.LLADA`. Raises ValueError naming each token that differs.
        """
        ids, least = {name: self._tokenizer.token_to_id(token) for name, token in CONTROL.items()}, 0
        if any(ids[name] is None for name in RESERVED):
            wrong = []
            if len(self) != LLADA.image_offset:
                wrong.append(f"it has {len(self)} entries, expected {LLADA.image_offset}")
            for name, token in CONTROL.items():
                want = getattr(LLADA, name)
                if name not in RESERVED and ids[name] != want:
                    wrong.append(f"{token!r} has id {ids[name]}, expected {want}")
                elif name in RESERVED and self._tokenizer.id_to_token(want) is None:
                    wrong.append(f"there is no id {want}, which {name} takes")
            if wrong:
                raise ValueError(f"the tokenizer isn't LLaDA's: {'; '.join(wrong)}")
            ids = {name: getattr(LLADA, name) for name in SPECIAL_TOKENS}
            least = LLADA.rows
        if any(ids[name] is None for name in ids):
            lacking = [CONTROL[name] for name in ids if ids[name] is None]
            raise ValueError(f"the tokenizer lacks the control tokens {', '.join(lacking)}")
        rows = rows or max(least, -(-(len(self) + codebook_size) // 64) * 64)
        return Vocab(image_offset=len(self), codebook_size=codebook_size, rows=rows, **ids)

    def replace(self, folder: storage.Path) -> None:
        """Puts this tokenizer in the place of the one in `folder`, if it differs. Where tokens of it have
        other strings now, what tells the old ones goes."""
        saved = folder / "tokenizer.json"
        theirs, ours = read_tokenizer(saved).get_vocab(), self._tokenizer.get_vocab()
        if theirs != ours:
            self.save(saved)
        if not theirs.items() <= ours.items():  # some have other strings now
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                         "chat_template.jinja", "vocab.json", "merges.txt"):  # fmt: skip
                (folder / name).unlink(missing_ok=True)

    def export(self, folder: storage.Path) -> None:
        """Completes the tokenizer's files in `folder` for users of PyTorch: with MMaDA's chat template,
        which differs from LLaDA's in a newline, and with the tokens of HEADERS if `load` has added them."""
        path = folder / "tokenizer_config.json"
        values = files.read_json(path, dict) if path.is_file() else dict(_PYTORCH)
        path.write_text(json.dumps(values | {"chat_template": TEMPLATE}, indent=2) + "\n")
        # transformers would prefer this file to the template in tokenizer_config.json.
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        saved = folder / "tokenizer.json"
        theirs = read_tokenizer(saved)
        with_mark = saved.read_bytes().startswith(codecs.BOM_UTF8)  # other programs refuse the mark
        if with_mark or theirs.get_vocab_size() != len(self):
            self.save(saved)


_PYTORCH = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": CONTROL["bos"],
    "eos_token": CONTROL["eos"],
    "pad_token": CONTROL["eos"],
    "mask_token": CONTROL["mask"],
    "clean_up_tokenization_spaces": False,
}


def read_tokenizer(path: storage.Name) -> Tokenizer:
    """The library's tokenizer in a tokenizer.json, unchanged. Raises OSError, or ValueError for a file that
    holds no tokenizer."""
    return read_text(files.read_text(path), path)


def read_text(text: str, path: storage.Name) -> Tokenizer:
    """The same of the text of the file at `path`."""
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def _adopted(tokenizer: Tokenizer, controls: Mapping[str, int], path: storage.Name) -> Tokenizer:
    """Another model's tokenizer with all tokens of CONTROL, of which those in `controls` have these ids."""
    values, given = json.loads(tokenizer.to_str()), {}
    for name in ("bos", "eos", "mask"):
        ours, theirs = tokenizer.token_to_id(CONTROL[name]), controls.get(name)
        wanted = ours if theirs is None else theirs
        if wanted is None or tokenizer.id_to_token(wanted) is None:
            raise ValueError(
                f"{path} has no control token {CONTROL[name]!r}, and config.json names no token of its own "
                f"for it: {name}_token_id is {theirs}; set it to the id that the model was trained with"
            )
        if ours not in (None, wanted):
            raise ValueError(
                f"{path} has {CONTROL[name]!r} as {ours}, but {name}_token_id of config.json is {theirs}; "
                "correct the wrong one"
            )
        if wanted in given.values():
            other = next(known for known, i in given.items() if i == wanted)
            raise ValueError(
                f"{other}_token_id and {name}_token_id of config.json are both {wanted}; this model needs "
                "a token for each, so set one to a token that is unused"
            )
        given[name] = wanted
        if ours is None:
            values = _renamed(values, tokenizer.id_to_token(wanted), CONTROL[name], path)
    tokenizer = read_text(json.dumps(values), path)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL.values()])
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    if ids != list(range(len(ids))):
        raise ValueError(f"the ids of {path} have gaps; image codes can't follow them")
    return tokenizer


def _renamed(values: dict, old: str, new: str, path: storage.Name) -> dict:
    """The values of a tokenizer.json in which a token has another string. Raises ValueError for a token
    that texts are made of."""
    model, added = values["model"], {token["content"] for token in values.get("added_tokens") or ()}
    vocab, unknown = model.get("vocab"), {model.get("unk_token")}
    if isinstance(vocab, list) and model.get("unk_id") is not None:
        unknown.add(vocab[model["unk_id"]][0])
    if old in unknown or old not in added:
        raise ValueError(
            f"{path}: {old!r} stands for texts and can't be a control token; config.json names another id"
        )
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ()]
    if any(old in (*pair, "".join(pair)) for pair in merges):
        raise ValueError(
            f"{path}: {old!r} is a part of texts and can't be a control token; config.json names another id"
        )

    def rename(part):
        if isinstance(part, dict):
            return {rename(key): rename(value) for key, value in part.items()}
        if isinstance(part, list):
            return [rename(value) for value in part]
        return new if part == old else part

    if isinstance(vocab, dict):
        vocab = {new if token == old else token: i for token, i in vocab.items()}
    elif vocab:  # Unigram: pairs of a token and its score
        vocab = [[new if token == old else token, score] for token, score in vocab]
    named = {key: rename(values.get(key)) for key in ("added_tokens", "post_processor")}
    return values | named | {"model": model | ({"vocab": vocab} if vocab else {})}


def chat(messages: str | Sequence[Mapping[str, str]], answer: str | None = None) -> Template:
    """Renders a conversation as MMaDA's template does: single newline after a header, BOS in front.

    `messages` are turns {"role", "content"}, or one question of the user. The template ends with the
    assistant's header and its newline, so that a model can continue it. With `answer`, as in training, it
    ends with that answer and the end of its turn. Raises ValueError for a turn without role or content.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    start, end, end_turn = (Control(name) for name in HEADERS)
    parts = [Control("bos")]
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"turn {i + 1} of a conversation has no text as its {key!r}: {str(message)[:60]}; "
                    "every turn needs a 'role' and a 'content'"
                )
        parts += [start, message["role"], end, f"\n{message['content'].strip()}", end_turn]
    parts += [start, "assistant", end]
    return Template((*parts, "\n") if answer is None else (*parts, f"\n{answer}", end_turn))


def parse_chat(text: str) -> Template:
    """The template of a conversation that another program rendered, with the strings of CONTROL.

    The start, the end, headers and ends of turns become control tokens, even if a person has typed them:
    a rendered text doesn't tell the difference. Raises ValueError for a text without a header.
    """
    names = {CONTROL[name]: Control(name) for name in ("bos", "eos", *HEADERS)}
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    if not {CONTROL["start_header"], CONTROL["end_header"]} <= set(parts):
        raise ValueError(f"the text {text[:40]!r} is no rendered conversation: it has no header")
    return Template(tuple(names.get(part, part) for part in parts if part))


def _why_refused(text: str, error: BaseException) -> str:
    if not isinstance(text, str):
        return f"a text is expected, not {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        at = wrong.start
        return f"a text has half of a surrogate pair: {text[max(0, at - 20) : at + 1]!r}"
    return f"the tokenizer can't take the text {text[:40]!r}: {error}"


def conversation_end(ids: Sequence[int], vocab: Vocab) -> list[int]:
    """Generated ids up to the first end of turn or of text."""
    ids = [int(i) for i in ids]
    ends = [i for i, token in enumerate(ids) if token in (vocab.eos, vocab.end_turn)]
    return ids[: ends[0]] if ends else ids


def cut(text: str, stops: str | Sequence[str]) -> str:
    """A text up to the first of `stops`, of which empty ones count for nothing."""
    stops = [stops] if isinstance(stops, str) else stops
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def split_thought(text: str) -> tuple[str, str]:
    """`<think>thought</think>answer` -> (thought, answer).

    A text without tags is an answer. Without the first tag the thought begins where the text begins;
    without the second tag the thought never ends, and the answer is empty.
    """
    before, end, answer = text.partition(END_THINK)
    if not end and THINK not in text:
        return "", text.strip()
    return before.partition(THINK)[2].strip() if THINK in before else before.strip(), answer.strip()
