"""Programs that belong to the repository; the others are calls of mmada_jax/programs/."""

from mmada_jax.programs.process import fail, keep_memory, keep_programs

__all__ = ["fail", "keep_memory", "keep_programs"]
