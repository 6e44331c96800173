"""Attention kernels: the plain definition, and Pallas for TPU. README.md says which is used."""

# Name under which every implementation lets a caller keep its result (and logsumexp) for the backward
# pass, see jax.ad_checkpoint.checkpoint_name.
KEPT = "attention"
