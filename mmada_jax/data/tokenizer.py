"""Text tokens: training a small BPE, loading one, the chat template, and the Vocab that follows."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmada_jax.vocab import LLADA, SPECIAL_TOKENS, Vocab

# The control tokens as strings of a tokenizer of our own. LLaDA's has the first group alone; of the
# second it reserves ids under other strings, which MMaDA took over by number.
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

# The template of `chat`, for programs that render it themselves.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}<|startoftext|>{% endif %}<|start_header_id|>"
    "{{ message['role'] }}<|end_header_id|>\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\\n' }}"
)


class TextTokenizer:
    """Text <-> ids. Control tokens are recognised in text that this project renders, never decoded."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, corpus: Iterable[str], size: int) -> "TextTokenizer":
        """A byte-level BPE of at most `size` ids, the control tokens first, <think> and </think> last.

        Numbers below twenty are single tokens where the corpus has them; others are digits."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"1\d|\d|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - 2,
            special_tokens=[CONTROL[name] for name in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus, trainer)
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in (THINK, END_THINK)])
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "TextTokenizer":
        """Reads a tokenizer.json. Where LLaDA's lacks the three tokens of the chat template they are
        added, as MMaDA does."""
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.get_vocab_size() == LLADA.start_header:
            tokenizer.add_special_tokens([AddedToken(CONTROL[name], special=True) for name in HEADERS])
        return cls(tokenizer)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a tokenizer.json, whole or not at all."""
        temporary = pathlib.Path(path).with_suffix(".tmp")
        self._tokenizer.save(str(temporary))
        temporary.replace(path)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, control tokens of the chat template included, none added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text, without control tokens; ids beyond the text tokenizer are left out."""
        known = [int(i) for i in ids if i < len(self)]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def vocab(self, codebook_size: int, rows: int | None = None) -> Vocab:
        """The flat vocabulary of this tokenizer and an image codebook, in `rows` embedding rows (by
        default as many as are needed, rounded up to a multiple of 64; of LLaDA's, as many as MMaDA has).

        A tokenizer of our own has all control tokens. Any other must be LLaDA's: 126349 entries, its
        control tokens at the ids of `vocab.LLADA`. Raises ValueError naming each token that isn't.
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

    def export(self, folder: pathlib.Path) -> None:
        """Completes the tokenizer's files in `folder` for the users of PyTorch: the chat template of
        MMaDA (LLaDA's has another newline), and the headers' tokens where they had to be added."""
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text()) if path.is_file() else dict(_PYTORCH)
        path.write_text(json.dumps(values | {"chat_template": TEMPLATE}, indent=2) + "\n")
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # would be taken instead
        if Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() != len(self):
            self.save(folder / "tokenizer.json")


_PYTORCH = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": CONTROL["bos"],
    "eos_token": CONTROL["eos"],
    "pad_token": CONTROL["eos"],
    "mask_token": CONTROL["mask"],
    "clean_up_tokenization_spaces": False,
}


def chat(messages: str | Sequence[Mapping[str, str]], answer: str | None = None) -> str:
    """Renders a conversation as MMaDA's template does: single newline after a header, BOS in the text.

    `messages` are {"role", "content"} in turns, or one question of the user. The text ends with the
    assistant's header and its newline, ready to be continued; with `answer`, as a training text does,
    with that answer and the end of its turn.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    header, end, turn = CONTROL["start_header"], CONTROL["end_header"], CONTROL["end_turn"]
    turns = [f"{header}{m['role']}{end}\n{m['content'].strip()}{turn}" for m in messages]
    text = f"{CONTROL['bos']}{''.join(turns)}{header}assistant{end}\n"
    return text if answer is None else f"{text}{answer}{turn}"


def conversation_end(ids: Sequence[int], vocab: Vocab) -> list[int]:
    """Generated ids up to the first end of turn or of text."""
    ids = [int(i) for i in ids]
    ends = [i for i, token in enumerate(ids) if token in (vocab.eos, vocab.end_turn)]
    return ids[: ends[0]] if ends else ids


def split_thought(text: str) -> tuple[str, str]:
    """`<think>thought</think>answer` -> (thought, answer).

    A text without the tags is all answer; without the first tag the thought begins with the text,
    without the second it is never left and there is no answer.
    """
    before, end, answer = text.partition(END_THINK)
    if not end and THINK not in text:
        return "", text.strip()
    return before.partition(THINK)[2].strip() if THINK in before else before.strip(), answer.strip()
