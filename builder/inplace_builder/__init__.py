"""The offline builder: from a PyTorch model to an engine directory that the backend serves."""
