"""Executes a model while its weights arrive.

The way of a chunk to a layer: `plan` decides what stays and what is streamed, `schedule` what comes next, `slots` which
slot it gets (all pure). `engine` carries that out over `host` memory, which `loader` fills. `hooks` put a layer's
tensors in place before it runs and take them away afterwards; `rows` reads single rows of tables that are not there.
"""
