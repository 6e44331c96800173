"""Programs that belong to the repository; the others are calls of mmada_jax/programs/."""
