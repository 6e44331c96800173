"""Text tokens: training a small BPE, loading one, the chat template, and the Vocab that follows."""

import pathlib
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmada_jax.vocab import SPECIAL_TOKENS, Vocab

# The control tokens as strings of a tokenizer of our own. (In LLaDA's they are reserved ids.)
CONTROL = {
    "bos": "<|startoftext|>",
    "eos": "<|endoftext|>",
    "mask": "<|mdm_mask|>",
    "pad": "[iPAD]",
    "soi": "<|soi|>",
    "eoi": "<|eoi|>",
    "t2i": "<|t2i|>",
    "mmu": "<|mmu|>",
    "r2i": "<|r2i|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "end_turn": "<|eot_id|>",
}


class TextTokenizer:
    """Text <-> ids. Control tokens are recognised in text that this project renders, never decoded."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, corpus: Iterable[str], size: int) -> "TextTokenizer":
        """A byte-level BPE of `size` ids, the control tokens first; digits stay single tokens."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\d|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[CONTROL[name] for name in SPECIAL_TOKENS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "TextTokenizer":
        """Reads a tokenizer.json."""
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        return cls(Tokenizer.from_file(str(path)))

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

    def vocab(self, codebook_size: int, multiple: int = 64) -> Vocab:
        """The flat vocabulary of this tokenizer and an image codebook; rows rounded up."""
        ids = {name: self._tokenizer.token_to_id(token) for name, token in CONTROL.items()}
        rows = -(-(len(self) + codebook_size) // multiple) * multiple
        return Vocab(image_offset=len(self), codebook_size=codebook_size, rows=rows, **ids)


def chat(question: str, answer: str | None = None) -> str:
    """Renders one turn as MMaDA's template does: single newline after a header, BOS in the text.

    Without an answer it ends right after the assistant's header; the newline that follows it is part
    of the answer, as in training.
    """
    header, end, turn = CONTROL["start_header"], CONTROL["end_header"], CONTROL["end_turn"]
    text = f"{CONTROL['bos']}{header}user{end}\n{question.strip()}{turn}{header}assistant{end}"
    return text if answer is None else f"{text}\n{answer}{turn}"


def conversation_end(ids: Sequence[int], vocab: Vocab) -> list[int]:
    """Generated ids up to the first end of turn or of text."""
    ids = [int(i) for i in ids]
    ends = [i for i, token in enumerate(ids) if token in (vocab.eos, vocab.end_turn)]
    return ids[: ends[0]] if ends else ids
