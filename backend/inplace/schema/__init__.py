"""What is on disk: the manifests of engines, and the records they are made of."""
