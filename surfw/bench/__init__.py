"""Measurements, returned as data: each against a baseline of the same run.

`wire`, `storage`, `chunk` and `flood` give rows (`result`). `infer` compares generations: `comparison` says what is
compared, `process` runs each file of `peers` in a process of its own, under a `cap`, and `infer_result` makes the rows.
"""
