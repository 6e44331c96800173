"""Ids of the one flat vocabulary, text as ids, and where the tokens of a task stand in its row."""
