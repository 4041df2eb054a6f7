"""Models for people: a streaming model is transformers' own model over a source of weights.

The public names are those of the stub beside this file. Each is loaded at its first use: a source of weights can be
opened before torch is imported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
