"""Rewards: answers read and compared, in processes of their own where a library may hang."""
