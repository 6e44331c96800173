"""A reward of one's own: a function `(prompt, completion, answer, image) -> number` in a file that is
allowed by its name. It runs in processes of its own, with a time limit for each completion."""

import base64
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from mmada_jax.data.images import png_of
from mmada_jax.nets import vq
from mmada_jax.train.rl.rewards import score_file
from mmada_jax.train.rl.rewards.workers import Workers


class OwnReward:
    """The function `name` of the Python file `file`. Raises ValueError if no file is allowed, or if it
    doesn't exist; what is wrong with it is found when training begins (`start`).

    limit    seconds that a completion may take
    workers  processes
    """

    def __init__(self, name: str = "", file: str = "", limit: float = 5.0, workers: int = 2):
        if not name or not file:
            raise ValueError(
                f"reward 'own:{name}' is code of yours: name the function as own:NAME, and allow its file "
                "by --allow_code FILE.py"
            )
        path = pathlib.Path(file).absolute()
        if not path.is_file():
            raise ValueError(f"--allow_code {file}: there is no such file")
        self._workers = Workers((str(path), name), limit, workers, score_file.__file__)
        self.close, self.stop = self._workers.close, self._workers.stop

    def start(self) -> None:
        """Runs the file. Raises RuntimeError with its error."""
        self._workers.ask("load", *self._workers.loads)

    def __call__(self, prompts, completions, images, answers) -> np.ndarray:
        """The scores [N]; rows whose call fails are told by Unscored."""
        rows = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            png = None if images is None else _png(images[i])
            rows.append(("score", prompt, completion, None if answers is None else answers[i], png))
        return self._workers.scores(rows)


def _png(pixels: Any) -> str:
    shades = vq.to_uint8(pixels)
    picture = Image.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades)
    return base64.b64encode(png_of(picture)).decode()
