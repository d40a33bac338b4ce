"""One model instance: slots, sequences, requests, batches and metrics. Knows nothing of tritonserver."""
