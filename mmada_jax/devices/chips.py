"""What we know of the accelerators: names, memory, peak, topologies, compiler options.

Facts are Google's published ones, but for the memory, which is what the compiler lets a program use.
"""

import dataclasses
import math
import re

# Collectives run beside compute: gathers of weights, and the sums of their gradients.
_ASYNC = {
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # Small sums aren't merged into one large one, which nothing could hide.
    "xla_jf_crs_combiner_threshold_in_bytes": "1048576",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator. `scoped_vmem_kib` is what a fusion may use of the fast memory."""

    kind: str  # jax's device_kind
    hbm_gib: float
    tflops: float  # dense bfloat16
    ghz: float
    topologies: tuple[str, ...]
    wraps: int  # an axis that is a multiple of this long is a ring
    hbm_gbps: float  # gigabytes that it reads from its memory in a second
    cores: int = 1  # per chip, in the cloud's names: v5p-128 has 64 chips
    scoped_vmem_kib: int | None = None
    # No compiler of its own is here: what a program needs is what XLA's for CPUs says.
    on_host: bool = False

    @property
    def compiler_options(self) -> dict[str, str]:
        """Options of a compilation for this chip."""
        vmem = self.scoped_vmem_kib
        return _ASYNC | ({"xla_tpu_scoped_vmem_limit_kib": str(vmem)} if vmem else {})


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip

CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75, 197, 1.5, _FLAT, wraps=16, hbm_gbps=819),
    "v5p": Chip("TPU v5", 95.74, 459, 1.75, _CUBES, wraps=4, hbm_gbps=2765, cores=2, scoped_vmem_kib=32768),
    "v6e": Chip("TPU v6 lite", 31.25, 918, 1.75, _FLAT, wraps=16, hbm_gbps=1640, scoped_vmem_kib=65536),
    "h100": Chip("H100 80 GB", 79.6, 989, 1.98, ("1x1",), wraps=1, hbm_gbps=3350, on_host=True),
}


# Dense bfloat16 of GPUs, by jax's device_kind.
GPU_TFLOPS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA A100-SXM4-80GB": 312}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of chips of one kind; `shape` is the shape of one slice."""

    name: str  # of the chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Its kind of chip."""
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    def __str__(self):
        shape = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return shape if self.slices == 1 else f"{self.slices} x {shape}"


def topology(text: str, slices: int = 1) -> Topology:
    """ "v5p:4x4x4", or the cloud's name for the same, "v5p-128", which counts cores on v5p, or
    "v5litepod-64".

    Raises ValueError for anything that doesn't exist, naming what does.
    """
    if slices < 1:
        raise ValueError(f"slices is {slices}; it must be at least 1")
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", text.replace("v5litepod", "v5e"))
    chip = CHIPS.get(match[1]) if match else None
    for shape in chip.topologies if chip else ():
        size = tuple(map(int, shape.split("x")))
        if match[2] == shape or (match[3] and int(match[3]) == math.prod(size) * chip.cores):
            return Topology(match[1], size, slices)
    known = "\n".join(f"  {name}: {' '.join(c.topologies)}" for name, c in CHIPS.items())
    raise ValueError(f"unknown topology {text!r}; known are, as in v5p:4x4x4,\n{known}")


def peak_tflops(kind: str) -> float | None:
    """Dense bfloat16 of the TPU or GPU that jax calls `kind`, None if it isn't known."""
    chip = of_kind(kind)
    return chip.tflops if chip else GPU_TFLOPS.get(kind)


def of_kind(kind: str) -> Chip | None:
    """The chip that jax calls `kind`, None if it isn't one of CHIPS."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
