"""Checkpoint → store. `plan` decides purely what each chunk will hold; `writer` streams the bytes there."""
