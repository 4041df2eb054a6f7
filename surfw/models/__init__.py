"""The public model classes: a streaming model is a transformers model over a source of weights.

The public names are those of the stub `__init__.pyi`. Each is loaded at its first use, so that a source of weights can
be opened before torch is imported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
