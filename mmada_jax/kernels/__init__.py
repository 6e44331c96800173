"""Attention kernels: the plain definition, Pallas for TPU and for GPU. README.md says which is used."""

# Name under which every implementation lets a caller keep its result (and logsumexp) for the backward
# pass, see jax.ad_checkpoint.checkpoint_name.
KEPT = "attention"
