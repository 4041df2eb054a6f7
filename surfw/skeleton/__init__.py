"""A model without its weights: config → class → modules on the meta device, and what transformers would load into them.

Private parts of transformers are used here and nowhere else in surfw: the loader's own renamings and conversions
(`loading`), and its initialisation of buffers (`build`). The release line they follow is pinned in `pyproject.toml`.
"""
