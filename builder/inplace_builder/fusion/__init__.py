"""Fusion of operators before a graph is lowered."""
