"""From the graph of one sequence to a graph of packed rows."""
