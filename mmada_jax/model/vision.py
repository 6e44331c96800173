"""The image tokenizer on a mesh: pixels to codes and back, the images spread over all devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmada_jax.devices import sharding
from mmada_jax.nets import vq

# Of the images that go through a device at a time; of all that are decoded together, since every device
# gets their pixels, where one for each device isn't more.
MOST_PIXELS = 2**22


@dataclasses.dataclass(frozen=True)
class Vision:
    """The image tokenizer: float32 `params`, whole on every device of `mesh`, for images of `grid` (rows
    and columns) codes.

    Where there are several processes, all call its methods, with the same images; all get all results.
    """

    params: Any = dataclasses.field(repr=False)
    config: vq.Config
    grid: tuple[int, int]
    mesh: jax.sharding.Mesh

    @classmethod
    def place(
        cls, params: Any, config: vq.Config, grid: tuple[int, int], mesh: jax.sharding.Mesh
    ) -> "Vision":
        """Puts params, arrays of the host or Lazy ones, onto the mesh."""
        everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), params)
        return cls(sharding.put_params(params, everywhere, np.dtype("float32")), config, grid, mesh)

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns of an image in pixels."""
        down = self.config.downsampling
        return self.grid[0] * down, self.grid[1] * down

    @property
    def n_image(self) -> int:
        """Codes of an image."""
        return math.prod(self.grid)

    def encode(self, pixels_BIJC: np.ndarray) -> np.ndarray:
        """Pixels, uint8 or floats in [-1, 1], -> codes int32 [B, i, j]."""
        most = self.mesh.size * max(1, MOST_PIXELS // math.prod(self.image_size))
        return self._in_parts(_encoder(self.mesh, self.config), np.asarray(pixels_BIJC), most)

    def decode(self, codes_Bij: np.ndarray) -> np.ndarray:
        """Codes [B, i, j], of any grid, -> pixels float32 [B, I, J, C] around [-1, 1]."""
        most = MOST_PIXELS // math.prod(self.image_size)
        return self._in_parts(_decoder(self.mesh, self.config), np.asarray(codes_Bij), most)

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


def codes_of(params: Any, config: vq.Config, pixels_BIJC: jax.Array) -> jax.Array:
    """Within a jit: pixels, uint8 or floats in [-1, 1], -> codes int32 [B, i, j]."""
    if pixels_BIJC.dtype == jnp.uint8:
        pixels_BIJC = pixels_BIJC.astype(jnp.float32) / np.float32(127.5) - 1
    return vq.encode(params, config, pixels_BIJC)


def _over_all(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Images over every device: the params are whole on each, so no axis of the mesh is left out."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


@functools.cache
def _encoder(mesh: jax.sharding.Mesh, config: vq.Config) -> Callable[..., jax.Array]:
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        lambda params, pixels_BIJC: codes_of(params, config, pixels_BIJC),
        in_shardings=(everywhere, _over_all(mesh)),
        out_shardings=everywhere,
    )


@functools.cache
def _decoder(mesh: jax.sharding.Mesh, config: vq.Config) -> Callable[..., jax.Array]:
    everywhere = sharding.replicated(mesh)
    return jax.jit(
        lambda params, codes_Bij: vq.decode(params, config, codes_Bij),
        in_shardings=(everywhere, _over_all(mesh)),
        out_shardings=everywhere,
    )
