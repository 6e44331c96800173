"""What is being denoised, as HTML: hidden tokens visibly hidden, newly revealed ones marked."""

import base64
import html
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmada_jax.data.images import png_of
from mmada_jax.model.model import Model
from mmada_jax.model.results import HIDDEN
from mmada_jax.tokens.tokenizer import END_THINK, THINK, conversation_end

# Pixels of the longer side of a drawing as it is shown, about.
SHOWN = 384
MARK = (255, 140, 0)
_TAGS = {THINK: '<b class="tag">thinks</b>', END_THINK: '<b class="tag">says</b>'}


def text(model: Model, ids: Sequence[int], before: Sequence[int] | None = None) -> str:
    """A text of which some tokens may be hidden. Those that were hidden in `before` are marked."""
    kept = np.asarray(conversation_end(ids, model.vocab), np.int64)
    hidden = kept == model.vocab.mask
    new = np.zeros(len(kept), bool) if before is None else before[: len(kept)] == model.vocab.mask
    parts = []
    for kind, group in itertools.groupby(range(len(kept)), lambda i: (bool(hidden[i]), bool(new[i]))):
        places = list(group)
        if kind[0]:
            parts.append(f'<span class="hidden">{HIDDEN * len(places)}</span>')
            continue
        said = html.escape(model.tokenizer.decode(kept[places].tolist()))
        for tag, shown in _TAGS.items():
            said = said.replace(html.escape(tag), shown)
        parts.append(f"<mark>{said}</mark>" if kind[1] else said)
    return f'<div class="said">{"".join(parts)}</div>'


def drawing(
    model: Model, codes_ij: np.ndarray, before_ij: np.ndarray | None = None, name: str = "drawing"
) -> str:
    """A drawing of which some codes may be hidden (-1); those that were hidden in `before` have a frame. A
    finished one can be saved."""
    [drawn] = model.drawings(codes_ij[None])
    image = drawn.enlarged(max(1, SHOWN // max(drawn.image.size))).convert("RGB")
    side = image.width // codes_ij.shape[1]
    pen = ImageDraw.Draw(image)
    hidden_ij = codes_ij < 0
    for i, j in np.argwhere(hidden_ij):
        pen.line([(j * side, (i + 1) * side), ((j + 1) * side, i * side)], (150, 150, 150))
    if before_ij is not None:
        for i, j in np.argwhere((before_ij < 0) & ~hidden_ij):
            pen.rectangle([j * side, i * side, (j + 1) * side - 1, (i + 1) * side - 1], outline=MARK)
    shown = f'<img class="drawing" alt="{name}" src="{_url(image)}">'
    if hidden_ij.any():
        return shown
    return f'{shown}<a download="{name}.png" href="{_url(drawn.image)}">save</a>'


def _url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_of(image)).decode()}"
