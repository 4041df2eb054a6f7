"""Executes a model while its weights arrive.

`residency` decides purely what stays and what is streamed; `engine` obeys it, loading chunks through `loader` into
`buffers`; `hooks` put a layer's tensors in place before it runs and take them away afterwards.
"""
