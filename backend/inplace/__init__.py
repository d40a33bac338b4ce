"""Inplace: a Triton Inference Server backend for models that keep state between requests.

This package is what the server needs: the operators, the manifest, the state memory, the sequences and the engines. It never
imports the builder.
"""

__version__ = "0.1.0"
