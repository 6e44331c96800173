"""What a trained model is worth: losses and judged generations on held-out data."""
