"""Training: configurations of runs, their optimizer and metrics, and the loop that they share."""
