"""surfw runs transformer models whose weights are somewhere else, or are bigger than memory.

The public names are those of the stub beside this file. Each is loaded at its first use, so that `import surfw` alone
loads neither torch nor transformers.
"""

import logging

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

logging.getLogger("surfw").addHandler(logging.NullHandler())
