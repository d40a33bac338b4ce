"""What is on disk: the files beside an engine, and the types they are made of."""
