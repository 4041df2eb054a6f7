"""Models without weights: configuration → class → modules on the meta device, and how checkpoints map to them.

This package is the only one in surfw that uses private parts of transformers: the loader's renamings and conversions
(`loading`), and its initialisation of buffers (`build`). The matching release line is pinned in `pyproject.toml`.
"""
