"""The model in use: what people give it, what they get, and the one image codec."""
