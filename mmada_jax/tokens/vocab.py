"""The id space: text | reserved | image codes. The only place where an id is written.

One flat vocabulary holds the text tokenizer's ids, the control tokens among them, and behind them
the codes of the image tokenizer, shifted by `image_offset`.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Ids of one checkpoint family.

    image_offset   id of image code 0: the length of the text tokenizer, which may be less than the number
                   of rows of the text model that a checkpoint grew from
    codebook_size  number of image codes
    rows           number of embedding rows, with the unused rows at the end
    """

    image_offset: int
    codebook_size: int
    rows: int
    bos: int
    eos: int  # also the right padding of lm, chat, mmu and r2i rows
    mask: int
    pad: int  # the left padding of t2i rows
    soi: int
    eoi: int
    t2i: int
    mmu: int
    r2i: int
    start_header: int
    end_header: int
    end_turn: int

    def __post_init__(self):
        if self.image_offset + self.codebook_size > self.rows:
            raise ValueError(
                f"{self.codebook_size} image codes from id {self.image_offset} on need "
                f"{self.image_offset + self.codebook_size} embedding rows, but rows={self.rows}"
                + ("" if self.codebook_size else "; from-torch --add-image-vocab makes more")
            )
        for name in SPECIAL_TOKENS:
            if not 0 <= getattr(self, name) < self.image_offset:
                raise ValueError(
                    f"special token {name}={getattr(self, name)} is outside the text ids "
                    f"[0, {self.image_offset})"
                )

    def image_ids(self, codes: Any) -> np.ndarray:
        """Tokenizer codes (any shape, in [0, codebook_size)) -> ids of the flat vocabulary."""
        codes = np.asarray(codes)
        bad = codes[(codes < 0) | (codes >= self.codebook_size)]
        if bad.size:
            raise ValueError(
                f"image code {int(bad[0])} is outside [0, {self.codebook_size}); "
                "were the codes made by a tokenizer with another codebook?"
            )
        return (codes + self.image_offset).astype(np.int32)

    def image_codes(self, ids: Any) -> np.ndarray:
        """Ids of the flat vocabulary (any shape, image ids only) -> tokenizer codes."""
        ids = np.asarray(ids)
        codes = ids - self.image_offset
        bad = ids[(codes < 0) | (codes >= self.codebook_size)]
        if bad.size:
            raise ValueError(
                f"id {int(bad[0])} is no image token: those are "
                f"[{self.image_offset}, {self.image_offset + self.codebook_size})"
            )
        return codes.astype(np.int32)


SPECIAL_TOKENS = (
    "bos", "eos", "mask", "pad", "soi", "eoi", "t2i", "mmu", "r2i",
    "start_header", "end_header", "end_turn",
)  # fmt: skip

# MMaDA-8B on the LLaDA tokenizer. Image codes begin at len(tokenizer), inside LLaDA's padded rows.
LLADA = Vocab(
    image_offset=126349,
    codebook_size=8192,
    rows=134656,
    bos=126080,
    eos=126081,
    mask=126336,
    pad=126093,
    soi=126084,
    eoi=126085,
    t2i=126088,
    mmu=126089,
    r2i=126094,
    start_header=126346,
    end_header=126347,
    end_turn=126348,
)
