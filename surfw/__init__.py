"""surfw runs transformer models whose weights are remote or bigger than memory.

The public names are listed in the stub next to this file. They are loaded lazily, so that `import surfw` alone loads
neither torch nor transformers.
"""

import logging

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

logging.getLogger("surfw").addHandler(logging.NullHandler())
