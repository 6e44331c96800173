"""Folders of arrays: streamed in pieces, read in any slice."""

import dataclasses

import jax
import numpy as np
import pytest
from states import CONFIG

from mmada_jax.nets import transformer
from mmada_jax.weights.arrays import open_params, write_params
from mmada_jax.weights.checkpoint import Checkpoints
from mmada_jax.weights.lazy import Lazy
from mmada_jax.weights.manifest import verify_manifest


def test_params_are_streamed_in_pieces_and_come_back_in_any_slice(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, n_layers=3, d_model=512, vocab=10_000)
    shapes = transformer.param_shapes(config)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    asked = []

    def lazy(array):
        def read(index):
            asked.append(array[index].nbytes)
            return array[index]

        return Lazy(array.shape, array.dtype, read)

    monkeypatch.setattr("mmada_jax.weights.lazy.PIECE", 1 << 20)
    counted = []
    axes = transformer.param_axes(config)
    write_params(tmp_path / "params", jax.tree.map(lazy, arrays), axes, counted.append)
    total = sum(x.nbytes for x in jax.tree.leaves(arrays))
    assert sum(counted) == sum(asked) == total
    # One chunk of rows at least: 256 of the head, 8192 of the embedding.
    assert max(asked) == 8192 * 512 * 4
    back = open_params(tmp_path / "params")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), back, arrays)
    np.testing.assert_array_equal(back["head_DV"][3:300, 8000:9000], arrays["head_DV"][3:300, 8000:9000])
    np.testing.assert_array_equal(back["blocks"]["q_DHK"][1], arrays["blocks"]["q_DHK"][1])
    verify_manifest(tmp_path / "params")


@pytest.mark.parametrize("name", ["run[1]", "[!a]", "a\\b"])
def test_a_folder_that_no_arrays_can_be_written_to_is_refused_at_the_start(tmp_path, name):
    for write in (Checkpoints, lambda path: write_params(path, {}, None)):
        with pytest.raises(ValueError, match=r"can't be written to .*; name another folder"):
            write(tmp_path / name / "run")
    assert not list(tmp_path.iterdir())
