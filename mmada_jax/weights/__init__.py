"""Params on disk: lazy arrays, key tables, manifests, checkpoints, workdirs, and conversions."""
