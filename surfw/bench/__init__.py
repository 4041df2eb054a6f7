"""Benchmarks that return data, each with a baseline from the same run.

`wire`, `storage`, `chunk` and `flood` return rows (`result`). `infer` compares generations: `comparison` describes what
to compare, `process` runs each module of `peers` in its own process under a `cap`, and `infer_result` makes the rows.
"""
