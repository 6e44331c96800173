"""What a model gives back: texts and drawings, which show themselves in a notebook.

They are made of token ids and pixels; making these is the business of `model.model`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmada_jax.data.images import png_of
from mmada_jax.tokens.tokenizer import TextTokenizer, conversation_end
from mmada_jax.tokens.vocab import Vocab

# Pixels of the longer side up to which small pictures are enlarged where they are shown or written.
SHOWN = 256
# The character that stands for a token that is still hidden.
HIDDEN = "▁"


@dataclasses.dataclass(frozen=True)
class Text:
    """A generated text and its token ids, up to the first end token. Texts that read the same are equal."""

    text: str
    ids: np.ndarray = dataclasses.field(repr=False, compare=False)

    @classmethod
    def of(cls, ids: Sequence[int], tokenizer: TextTokenizer, vocab: Vocab, hidden: str = "") -> "Text":
        """The text of generated ids, with `hidden` for each that is still to be revealed."""
        ids, text = conversation_end(ids, vocab), ""
        for is_hidden, part in itertools.groupby(ids, lambda i: bool(hidden) and i == vocab.mask):
            part = list(part)
            text += hidden * len(part) if is_hidden else tokenizer.decode(part)
        return cls(text.strip(), np.asarray(ids, np.int32))

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Drawing:
    """A generated image and its codes [i, j]; a code is -1 where the image isn't drawn yet."""

    image: Image.Image
    codes: np.ndarray

    def __repr__(self) -> str:
        (columns, rows), (i, j) = self.image.size, self.codes.shape
        return f"Drawing({rows} x {columns} pixels, {i} x {j} codes)"

    def enlarged(self, scale: int | None = None) -> Image.Image:
        """The image with `scale` x `scale` pixels for each; by default a small one gets about SHOWN."""
        scale = scale or max(1, SHOWN // max(self.image.size))
        return self.image.resize([scale * side for side in self.image.size], Image.Resampling.NEAREST)

    def _repr_png_(self) -> bytes:
        return png_of(self.enlarged())
