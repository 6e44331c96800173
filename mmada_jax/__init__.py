"""MMaDA in JAX: one masked-diffusion transformer that reads, reasons and draws."""
