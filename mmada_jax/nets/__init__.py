"""Networks: pure functions of params, the only files that know Flax."""
