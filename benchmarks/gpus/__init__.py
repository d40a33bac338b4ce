"""One model on several GPUs of a host, through one server."""
