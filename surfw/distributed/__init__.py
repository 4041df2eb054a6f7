"""Several processes that run one model together, started by `torchrun`: each reads only its share of the weights.

The public names are those of the stub beside this file. Each is loaded at its first use; `torch.distributed` is
imported only then.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
