"""The interface to tritonserver: only here is `triton_python_backend_utils` imported."""
