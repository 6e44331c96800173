"""Data: tokenizers, images and the sources that training reads."""
