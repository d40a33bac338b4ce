"""Passes: from graph to graph, or from graph to a refusal."""
