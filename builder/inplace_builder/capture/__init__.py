"""The front-ends: from a model to a graph on the ``inplace::`` operators, one file for each."""
