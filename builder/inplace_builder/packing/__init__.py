"""From the graph of one sequence to a graph of many rows: packed tokens, or a row a call."""
