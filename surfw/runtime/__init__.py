"""Executes a model while its weights arrive.

How a chunk gets to a layer: `plan` decides what is pinned and what is streamed, `schedule` predicts what is used next,
and `slots` decides which slot it gets (all pure). `engine` carries the decisions out over `host` memory, which `loader`
fills. `hooks` puts a layer's tensors in place before it runs and removes them afterwards; `rows` reads single rows of
tables that are not in memory.
"""
