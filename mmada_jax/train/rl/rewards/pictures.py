"""Rewards of pictures: how well they fit their prompts by CLIP, by ImageReward, and by scans of digits."""

import functools
import re

import jax
import numpy as np

from mmada_jax import storage
from mmada_jax.data import digits
from mmada_jax.nets import blip, clip
from mmada_jax.weights import blip_keys, clip_keys


class _Batched:
    """Params on a device of this process, and functions of them on batches of one size."""

    def __init__(self, params, batch):
        # The first process scores alone, so it may use only a device of its own.
        self._here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self._params, self._batch = jax.device_put(params, self._here), batch

    def jit(self, function):
        """`function` of the params and of arrays."""
        return jax.jit(function, in_shardings=self._here, out_shardings=self._here)

    def __call__(self, function, *arrays):
        """`function` of the rows of `arrays`; the last batch is filled up with copies."""
        out = []
        for i in range(0, len(arrays[0]), self._batch):
            parts = [x[i : i + self._batch] for x in arrays]
            more = self._batch - len(parts[0])
            filled = [np.concatenate([x, np.repeat(x[:1], more, axis=0)]) for x in parts]
            out.append(np.asarray(function(self._params, *filled)))
        return np.concatenate(out)[: len(arrays[0])]


class ClipScore:
    """100 x the cosine between the CLIP features of image and prompt (the scale of published CLIP scores).

    `folder` is a CLIP from Hugging Face; `batch` is the number of images or texts in one call of it.
    """

    def __init__(self, folder: storage.Name = "", batch: int = 32):
        if not folder:
            raise ValueError("reward 'clip' needs a model: set its folder to a CLIP from Hugging Face")
        params, config, self._tokenizer = clip_keys.load(folder)
        self._of, self._size = _Batched(params, batch), config.image_size
        self._image = self._of.jit(lambda p, x: clip.normalise(clip.image_features(p, config, x)))
        self._text = self._of.jit(lambda p, x: clip.normalise(clip.text_features(p, config, x)))

    def __call__(self, prompts, completions, images, answers):
        """Images are pixels [I, J, C], uint8 or floats in [-1, 1]. Prompts are cut after 77 tokens."""
        texts = list(dict.fromkeys(prompts))  # a group of responses shares its prompt
        tokens = np.array([code.ids for code in self._tokenizer.encode_batch(texts)], np.int32)
        text_BP = self._of(self._text, tokens)[[texts.index(prompt) for prompt in prompts]]
        image_BP = self._of(self._image, clip.preprocess(images, self._size))
        return 100 * np.sum(text_BP * image_BP, axis=1)


class ImageReward:
    """How well people would like a picture for its prompt, by ImageReward (arXiv 2304.05977): 0 in the
    mean, deviation 1.

    `folder` holds its weights and BERT's tokenizer.json (docs/evaluation.md); `batch` is the number of
    images in one call of it.
    """

    def __init__(self, folder: storage.Name = "", batch: int = 16):
        if not folder:
            raise ValueError("reward 'image_reward' needs a model: set its folder to one with ImageReward")
        params, config, self._tokenizer = blip_keys.load(folder)
        self._of, self._size = _Batched(params, batch), config.image_size
        self._rewards = self._of.jit(lambda p, *arrays: blip.rewards(p, config, *arrays))

    def __call__(self, prompts, completions, images, answers):
        """Images are pixels [I, J, C], uint8 or floats in [-1, 1]. Prompts are cut after 35 tokens."""
        codes = self._tokenizer.encode_batch(list(prompts))
        tokens_BT = np.array([code.ids for code in codes], np.int32)
        valid_BT = np.array([code.attention_mask for code in codes], bool)
        return self._of(self._rewards, clip.preprocess(images, self._size), tokens_BT, valid_BT)


def digit_probability():
    """The probability that the scan in the middle of a canvas [8, 16, 1] shows the prompted digit, by its
    nearest training scans. The judge that counts drawn digits is another model of the same scans."""
    neighbours = _neighbours()

    def score(prompts, completions, images, answers):
        wanted = [_prompted(prompt) for prompt in prompts]
        scans = [digits.cut(np.asarray(canvas), 1)[0] for canvas in images]
        return neighbours.predict_proba(_features(scans))[np.arange(len(wanted)), wanted].astype(np.float32)

    return score


@functools.cache
def _neighbours():
    try:
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'mmada_jax[digits]'") from error
    train = digits.load("train")
    # Among scikit-learn's classifiers with probabilities its held-out log-likelihood was one of the best,
    # and far from all scans it isn't sure of any digit.
    return KNeighborsClassifier(10, weights="distance").fit(_features(train.pixels), train.labels)


def _features(scans) -> np.ndarray:
    return np.clip(np.asarray(scans, np.float32), -1, 1).reshape(len(scans), -1)


def _prompted(prompt: str) -> int:
    named = [digits.WORDS.index(word) for word in re.findall(r"\w+", prompt) if word in digits.WORDS]
    if len(named) != 1:
        raise ValueError(f"the prompt {prompt!r} must name one digit; reward 'digit' scores no other")
    return named[0]
