"""Accelerators: what is known of them, the mesh, processes, and compiled programs read."""
