"""Attention kernels. Now: the plain reference; Pallas for TPU and GPU joins it here."""
