"""MMaDA in JAX: one masked-diffusion transformer that reads, reasons and draws.

    from mmada_jax import MMaDA

JAX and the rest are imported when one of these names is first used, not with the package.
"""

from typing import Any

__all__ = ["ImageRule", "MMaDA", "TextRule"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmada_jax.serve import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
