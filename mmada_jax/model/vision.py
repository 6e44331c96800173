"""The one image codec: pixels to codes and back, the images spread over all devices of a mesh.

The network is `nets.vq`; opening files and bringing pictures to a size is the business of `data.images`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmada_jax.data.pipeline import RawRows
from mmada_jax.devices import sharding
from mmada_jax.nets import vq
from mmada_jax.tokens import layout
from mmada_jax.tokens.vocab import Vocab

# Most pixels that a device encodes in one call, and most that all devices together decode in one call,
# since every device gets all decoded pixels; more images are split, down to one for each device.
MOST_PIXELS = 2**22


@dataclasses.dataclass(frozen=True)
class Vision:
    """The image tokenizer: float32 `params`, whole on every device of `mesh`.

    Where there are several processes, all call its methods, with the same images; all get all results.
    """

    params: Any = dataclasses.field(repr=False)
    config: vq.VQConfig
    mesh: jax.sharding.Mesh

    @classmethod
    def place(cls, params: Any, config: vq.VQConfig, mesh: jax.sharding.Mesh) -> "Vision":
        """Puts params, arrays of the host or Lazy ones, onto the mesh."""
        everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), params)
        return cls(sharding.put_params(params, everywhere, np.dtype("float32")), config, mesh)

    def encode(self, pixels_BIJC: np.ndarray) -> np.ndarray:
        """Pixels, uint8 or floats in [-1, 1], -> codes int32 [B, i, j]."""
        most = self.mesh.size * max(1, MOST_PIXELS // math.prod(np.shape(pixels_BIJC)[1:3]))
        return self._in_parts(_encoder(self.mesh, self.config), np.asarray(pixels_BIJC), most)

    def decode(self, codes_Bij: np.ndarray) -> np.ndarray:
        """Codes [B, i, j] -> pixels float32 [B, I, J, C] around [-1, 1]."""
        most = MOST_PIXELS // (math.prod(np.shape(codes_Bij)[1:]) * self.config.downsampling**2)
        return self._in_parts(_decoder(self.mesh, self.config), np.asarray(codes_Bij), most)

    def row_encoder(self, vocab: Vocab, max_text: int) -> Callable[[RawRows], layout.Batch]:
        """A function from the rows of a training batch, placed on the mesh, to the batch with the tokens of
        all images. Every device encodes the images of its own rows."""
        rows_on = sharding.batch_sharding(self.mesh)
        first_T = np.array([layout.image_start(task, max_text) for task in layout.TASKS], np.int32)

        def encode(params, rows):
            codes_Bij = _codes(params, self.config, rows.pixels_BIJC)
            ids_BN = codes_Bij.reshape(len(codes_Bij), -1).astype(jnp.int32) + jnp.int32(vocab.image_offset)
            placed_BL = jax.vmap(
                lambda tokens_L, ids_N, first: jax.lax.dynamic_update_slice(tokens_L, ids_N, (first,))
            )(rows.batch.tokens, ids_BN, jnp.asarray(first_T)[rows.batch.task])
            tokens_BL = jnp.where(rows.encode_B[:, None], placed_BL, rows.batch.tokens)
            return rows.batch._replace(tokens=tokens_BL)

        encode = jax.jit(
            encode, in_shardings=(sharding.replicated(self.mesh), rows_on), out_shardings=rows_on
        )
        return lambda rows: rows.batch if rows.pixels_BIJC is None else encode(self.params, rows)

    def _in_parts(
        self, run: Callable[[Any, jax.Array], jax.Array], x_B: np.ndarray, most: int
    ) -> np.ndarray:
        """`run` on about `most` images at a time. The last part is filled up: its images must divide among
        the devices, and one compilation serves all parts."""
        devices, place = self.mesh.size, _over_all(self.mesh)
        size = min(max(1, most // devices), -(-len(x_B) // devices)) * devices
        filled_B = np.concatenate([x_B, np.repeat(x_B[-1:], -len(x_B) % size, axis=0)])
        out = []
        for part in np.split(filled_B, len(filled_B) // size):
            placed = jax.make_array_from_callback(part.shape, place, part.__getitem__)
            with jax.set_mesh(self.mesh):
                out.append(np.asarray(run(self.params, placed)))
        return np.concatenate(out)[: len(x_B)]


def _codes(params: Any, config: vq.VQConfig, pixels_BIJC: jax.Array) -> jax.Array:
    """Within a jit: pixels, uint8 or floats in [-1, 1], -> codes int32 [B, i, j]."""
    if pixels_BIJC.dtype == jnp.uint8:
        pixels_BIJC = pixels_BIJC.astype(jnp.float32) / np.float32(127.5) - 1
    return vq.encode(params, config, pixels_BIJC)


def _over_all(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Images over every device: the params are whole on each, so no axis of the mesh is left out."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


@functools.cache
def _encoder(mesh: jax.sharding.Mesh, config: vq.VQConfig) -> Callable[..., jax.Array]:
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        lambda params, pixels_BIJC: _codes(params, config, pixels_BIJC),
        in_shardings=(everywhere, _over_all(mesh)),
        out_shardings=everywhere,
    )


@functools.cache
def _decoder(mesh: jax.sharding.Mesh, config: vq.VQConfig) -> Callable[..., jax.Array]:
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        lambda params, codes_Bij: vq.decode(params, config, codes_Bij),
        in_shardings=(everywhere, _over_all(mesh)),
        out_shardings=everywhere,
    )
