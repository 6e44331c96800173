"""Reinforcement learning: rollouts, rewards and the updates between them."""
