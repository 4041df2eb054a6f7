"""Runs one model in several processes started by `torchrun`, each of which reads only its share of the weights.

The public names are listed in the stub next to this file. They are loaded lazily; `torch.distributed` is imported on
first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
