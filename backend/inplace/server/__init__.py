"""The border to tritonserver: the only modules that import `triton_python_backend_utils`."""
