"""A report of what a folder holds, with hashes that a conversion doesn't change."""

from typing import Any

from mmada_jax import storage
from mmada_jax.progress import progress
from mmada_jax.weights import lazy
from mmada_jax.weights.arrays import open_params
from mmada_jax.weights.folder import ModelFolder, open_folder
from mmada_jax.weights.manifest import verify_manifest


def inspect(src: storage.Name) -> dict[str, Any]:
    """What a folder holds: kind, model type, parameters, dtype, hash, and whether its vocabulary fits.

    `sha256` hashes the parameters as PyTorch lays them out, in the order of PyTorch's keys, so that it is
    the same before and after a conversion. A training workdir has a `state_sha256` too: it hashes the
    parameters and the optimizer's state of the step, and doesn't depend on the mesh that wrote them. Two
    runs that agree up to a step have the same one.
    """
    source = open_folder(src)
    report = {
        "path": str(source.path),
        "kind": source.kind,
        "step": source.step,
        "model_type": source.model_type,
        "parameters": source.n_params,
        "tensors": len(source.tensors()),
        "dtype": source.dtype,
        "bytes": source.nbytes,
        "vocabulary": None if source.is_image_tokenizer else vocabulary(source),
        "image_tokenizer": str(source.image_tokenizer) if source.image_tokenizer else None,
    }
    with progress("hashing", source.nbytes) as bar:
        report["sha256"] = lazy.sha256(source.tensors(), bar.update)
    if source.step is not None:
        folder = source.path / "checkpoints" / str(source.step)
        verify_manifest(folder, "opt_state")
        state = {part: open_params(folder / part) for part in ("params", "opt_state")}
        arrays = {".".join(path): array for path, array in lazy.leaves(state)}
        with progress("hashing all", sum(array.nbytes for array in arrays.values())) as bar:
            report["state_sha256"] = lazy.sha256(arrays, bar.update)
    return report


def vocabulary(source: ModelFolder) -> dict[str, Any]:
    """Whether the text tokenizer, the image codes and the rows of a model's embedding fit together."""
    rows, codes = source.config.vocab, source.values.get("codebook_size") or 0
    report = {"rows": rows, "image_codes": codes, "tokenizer": None, "image_offset": None, "ok": False}
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return report | {"problem": "there is no tokenizer.json"}
    report |= {"tokenizer": len(tokenizer), "image_offset": len(tokenizer)}
    try:
        tokenizer.vocab(codes, rows)
    except ValueError as error:
        return report | {"problem": str(error)}
    return report | {"ok": True, "problem": None}
