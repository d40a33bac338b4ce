"""One model instance: slots, sequences, requests, batches and metrics; without tritonserver."""
