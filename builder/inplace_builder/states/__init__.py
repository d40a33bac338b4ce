"""Which tensors a module keeps and mutates, and how its graph comes to update them in place."""
