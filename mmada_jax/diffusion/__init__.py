"""The objective (hide tokens, weigh the loss) and its inverse (reveal them step by step)."""
