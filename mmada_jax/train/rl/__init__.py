"""Reinforcement learning: rollouts, rewards, UniGRPO, and the loop around them."""
