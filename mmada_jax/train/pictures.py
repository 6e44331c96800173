"""Training of the image tokenizer: its losses, on pictures of any source, and how well it rebuilds others.

The params are {"encoder", "decoder"}, and beside them what only training needs: the weights that are
"learned" where these two are their mean, and the "discriminator". Networks are in `nets.vq`.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

from mmada_jax import config as config_lib
from mmada_jax import storage
from mmada_jax.data import digits, pipeline
from mmada_jax.measure.held_out import grid
from mmada_jax.model.vision import Vision
from mmada_jax.nets import inception, lpips, vq
from mmada_jax.train.metrics import Metrics
from mmada_jax.train.program import Objective, Program
from mmada_jax.train.rows import open_pictures, say_left_out
from mmada_jax.train.runs import VQRun, grid_of, preset_of, relative
from mmada_jax.weights import judge_keys, lazy
from mmada_jax.weights.folder import open_image_tokenizer
from mmada_jax.weights.workdir import has_step

HALVES = ("encoder", "decoder")
# A batch that uses at most this share of the codes that it could use has a codebook that collapses.
COLLAPSED = 0.01


def codec_of(run: VQRun, workdir: storage.Path) -> vq.VQConfig:
    """The architecture of an image tokenizer that is trained. Raises ValueError for an unknown preset and
    for fields that don't fit each other, FileNotFoundError if what it starts from isn't there."""
    if bool(run.data) != bool(run.image_size):
        raise ValueError(
            f"image_size is {run.image_size} and data names {len(run.data)} sources; pictures of your own "
            "need both, canvases of digits neither"
        )
    if run.eval_every and not run.held_out:
        raise ValueError(f"eval_every is {run.eval_every} and held_out is empty; name sources there")
    if bool(run.perceptual) != bool(run.lpips):
        raise ValueError(
            f"perceptual is {run.perceptual} and lpips is {run.lpips!r}; the loss needs both a weight and "
            "the folder of its network"
        )
    if run.perceptual and not run.data:
        raise ValueError("perceptual needs pictures of your own in data; those of the digits are too small")
    if run.inception and run.eval_every and run.eval_rows < 2:
        raise ValueError(
            f"eval_rows is {run.eval_rows}; the distance by inception needs at least 2 pictures"
        )
    if run.perceptual and run.image_size < lpips.LEAST:
        raise ValueError(
            f"image_size is {run.image_size}; with perceptual it must be at least {lpips.LEAST} pixels"
        )
    if run.init and run.model:
        raise ValueError(f"model {run.model} has no effect: the architecture is that of init; drop it")
    if run.init:
        folder = workdir if has_step(workdir) else relative(run.init, workdir)
        return open_image_tokenizer(folder, weights=False).config
    values = dataclasses.asdict(preset_of(vq.PRESETS, run.preset)) | dict(run.model)
    return config_lib.from_dict(vq.VQConfig, values, "model.")


@dataclasses.dataclass(frozen=True)
class Canvases:
    """Batches of canvases of digits, [rows, 8, 16, 1], which train the image tokenizer."""

    rows: int
    seed: int
    from_bucket = False

    def load(self, step: int, which: Sequence[int] | None = None) -> pipeline.Loaded:
        """The canvases with the numbers `which` of `step`. By default all canvases."""
        of_digits = digits.open_records("reading", "train")
        which = range(self.rows) if which is None else which
        first = zlib.crc32(f"{self.seed}".encode()) + step * self.rows
        picked = [of_digits[(first + row) % len(of_digits)].image for row in which]
        return pipeline.Loaded(np.stack(picked), {})


def program(run: VQRun, workdir: storage.Path, mesh: jax.sharding.Mesh, codec: vq.VQConfig) -> Program:
    """The program of an image tokenizer of that architecture. Raises where its data or what it starts from
    can't be opened, or don't fit."""
    i, j = grid_of(run, codec)
    pixels = (i * codec.downsampling, j * codec.downsampling, codec.pixel_channels)
    tokens, start, evaluate = run.batch_size * i * j, None, None
    if not run.data:
        rows = Canvases(run.batch_size, run.seed)
    else:
        rows = open_pictures(run, workdir, "data", run.batch_size, pixels)
        say_left_out(rows)
        rows.load(0, [0])  # raises if no record can be used
    if run.eval_every:
        held_out = open_pictures(run, workdir, "held_out", run.eval_rows, pixels)
        say_left_out(held_out)
        judge = run.inception and judge_keys.load_inception(relative(run.inception, workdir))
        evaluate = evaluation(run, codec, mesh, held_out, judge or None)
    judges = {"lpips": judge_keys.load_lpips(relative(run.lpips, workdir))} if run.perceptual else None
    if run.init and not has_step(workdir):
        start = _start(run, open_image_tokenizer(relative(run.init, workdir)).params, codec)

    def remark(values: Mapping[str, float]) -> str | None:
        """A line if hardly any code is used."""
        most = min(codec.codebook_size, tokens)
        if values["codes_used"] > max(2, COLLAPSED * most):
            return None
        return (
            f"{values['codes_used']:.0f} different codes in a batch of {tokens} tokens, out of "
            f"{codec.codebook_size}: the codebook collapses; raise config.entropy ({run.entropy}) or lower "
            f"config.optim.lr ({run.optim.lr})"
        )

    return Program(
        objective=objective(run, codec),
        load=rows.load,
        encode=lambda pixels_BIJC: pixels_BIJC,
        tokens_per_step=tokens,
        start=start,
        frozen=judges,
        average=run.average,
        evaluate=evaluate,
        remark=remark,
        data=rows.description if run.data else {},
        from_bucket=rows.from_bucket,
    )


def objective(run: VQRun, codec: vq.VQConfig) -> Objective:
    """The losses of an image tokenizer and of its discriminator. Neither has a gradient in the other's
    params, so the gradient of the sum is both of theirs."""

    def init_params(key):
        params = vq.init_params(key, codec)
        if run.average:
            params["learned"] = params.copy()
        if run.adversarial:
            params["discriminator"] = vq.init_discriminator(jax.random.fold_in(key, 1), codec)
        return params

    def prepare(key, pixels_BIJC, step):
        del key  # nothing is drawn
        return pixels_BIJC, jnp.float32(step >= run.adversarial_start)

    def loss_fn(params, rows):
        pixels_BIJC, judged = rows
        rebuilt = vq.rebuild(params.get("learned", params), codec, pixels_BIJC)
        values, terms = dict(rebuilt.terms), rebuilt.terms
        total = terms["reconstruction"]
        total += run.entropy * terms["entropy"] + run.commitment * terms["commitment"]
        if run.perceptual:
            far_B = lpips.distance(params["lpips"], rebuilt.pixels_BIJC, pixels_BIJC)
            values["perceptual"] = jnp.mean(far_B)
            total += run.perceptual * values["perceptual"]
        if run.adversarial:
            fixed, real = jax.lax.stop_gradient(params["discriminator"]), params["discriminator"]
            values["adversarial"] = -jnp.mean(vq.realness(fixed, codec, rebuilt.pixels_BIJC))
            of_real = vq.realness(real, codec, pixels_BIJC)
            of_rebuilt = vq.realness(real, codec, jax.lax.stop_gradient(rebuilt.pixels_BIJC))
            values["discriminator"] = jnp.mean(jax.nn.relu(1 - of_real) + jax.nn.relu(1 + of_rebuilt))
            total += judged * (run.adversarial * values["adversarial"] + values["discriminator"])
        used_V = jnp.zeros(codec.codebook_size, bool).at[rebuilt.codes_Bij].set(True)
        values["codes_used"] = jnp.sum(used_V, dtype=jnp.float32)
        return total, values

    return Objective(init_params, None, prepare, loss_fn, lambda params, judges={}: {**params, **judges})


def _start(run, params, codec):
    """The params of a run that starts from an image tokenizer; a discriminator begins at random."""
    start = {half: params[half] for half in HALVES}
    if run.average:
        start["learned"] = start.copy()
    if run.adversarial:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        init = functools.partial(vq.init_discriminator, config=codec)
        make = jax.jit(init, in_shardings=here, out_shardings=here)
        start["discriminator"] = lazy.lazy(jax.device_get(make(jax.random.key(run.seed))))
    return start


def evaluation(
    run: VQRun,
    codec: vq.VQConfig,
    mesh: jax.sharding.Mesh,
    rows: pipeline.Pictures,
    judge: dict[str, Any] | None = None,
) -> Callable[[Any, int, Metrics], dict[str, float]]:
    """A function ([params, ...], step, metrics) -> values on the held-out pictures, which shows the first
    ones above what was rebuilt of them. All processes rebuild the same pictures, each its part. `judge`
    are the params of `nets.inception`."""
    pixels_of = functools.cache(lambda: rows.load(0).rows)
    known = functools.cache(lambda: inception_features(judge, pixels_of()))

    def measure(parts, step, metrics):
        params, pixels_BIJC = parts[0], pixels_of()
        vision = Vision({half: params[half] for half in HALVES}, codec, mesh)
        codes_Bij = vision.encode(pixels_BIJC)
        rebuilt_BIJC = np.clip(vision.decode(codes_Bij), -1, 1)
        if n := min(run.samples, len(pixels_BIJC)):
            pairs = np.concatenate([pixels_BIJC[:n], rebuilt_BIJC[:n]])
            metrics.show(step, grid(pairs, n), [])
        values = compare(pixels_BIJC, rebuilt_BIJC) | usage(codes_Bij, codec.codebook_size)
        if judge is not None:
            values["rfid"] = frechet(known(), inception_features(judge, rebuilt_BIJC))
        return {f"held_out_{name}": value for name, value in values.items()}

    return measure


def compare(pixels_BIJC: np.ndarray, rebuilt_BIJC: np.ndarray) -> dict[str, float]:
    """How near pictures in [-1, 1] are to others, means over the pictures: `psnr` in dB, and `ssim`
    (Wang et al. 2004; a window of 11 pixels, or the largest odd one that fits)."""
    error_B = np.mean((pixels_BIJC - rebuilt_BIJC) ** 2, axis=(1, 2, 3))
    psnr_B = 10 * np.log10(4 / np.maximum(error_B, 1e-10))
    side = min(11, *pixels_BIJC.shape[1:3])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ssim_B = _ssim(side - (side % 2 == 0))(pixels_BIJC, rebuilt_BIJC)
    return {"psnr": float(np.mean(psnr_B)), "ssim": float(np.mean(ssim_B))}


@functools.cache
def _ssim(window):
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    of_two = functools.partial(dm_pix.ssim, max_val=2.0, filter_size=window)
    return jax.jit(of_two, in_shardings=here, out_shardings=here)


def inception_features(params: dict[str, Any], pixels_BIJC: np.ndarray, size: int = 16) -> np.ndarray:
    """The features [B, F] that the Frechet distance compares, `size` pictures at a time."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    run = jax.jit(inception.features, in_shardings=here, out_shardings=here)
    parts = [pixels_BIJC[i : i + size] for i in range(0, len(pixels_BIJC), size)]
    return np.concatenate([np.asarray(run(params, part)) for part in parts])


def frechet(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """The Frechet distance of two sets of features, each taken for a normal distribution (arXiv
    1706.08500): |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)). It grows as the sets become smaller, so
    only sets of the same size can be compared. Needs two pictures at least."""
    if min(len(a_NF), len(b_NF)) < 2:
        raise ValueError("the Frechet distance needs at least two pictures of each kind; raise eval_rows")
    means = [x.mean(0, dtype=np.float64) for x in (a_NF, b_NF)]
    # C = X^T X, so the trace of the root is the sum of the singular values of X X'^T: a small matrix.
    x, y = ((of - mean) / math.sqrt(len(of) - 1) for of, mean in zip((a_NF, b_NF), means, strict=True))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(np.sum((means[0] - means[1]) ** 2) + np.sum(x**2) + np.sum(y**2) - 2 * root)


def usage(codes: np.ndarray, size: int) -> dict[str, float]:
    """Which share of a codebook of that size is used, and the perplexity of its use: the number of codes
    that, used equally often, would say as much."""
    count_V = np.bincount(np.asarray(codes).ravel(), minlength=size)
    p_V = count_V[count_V > 0] / count_V.sum()
    return {
        "codes_used": float(np.mean(count_V > 0)),
        "perplexity": math.exp(-np.sum(p_V * np.log(p_V))),
    }
