# The public names of surfw: this list, and nothing else. README.md shows each of them in use.

from .checkpoint.demo import demo_checkpoint as demo_checkpoint
from .chunking.library import ModelChunker as ModelChunker
from .chunking.library import ModelInfo as ModelInfo
from .config import WireLimits as WireLimits
from .errors import CheckpointError as CheckpointError
from .errors import ConfigurationError as ConfigurationError
from .errors import ConnectionFailedError as ConnectionFailedError
from .errors import IntegrityError as IntegrityError
from .errors import LocalProtocolError as LocalProtocolError
from .errors import ManifestError as ManifestError
from .errors import ModelClosedError as ModelClosedError
from .errors import ModelError as ModelError
from .errors import NotAStoreError as NotAStoreError
from .errors import NotFoundError as NotFoundError
from .errors import RefusedError as RefusedError
from .errors import RemoteProtocolError as RemoteProtocolError
from .errors import StorageError as StorageError
from .errors import StorageFullError as StorageFullError
from .errors import SurfwError as SurfwError
from .errors import UninitializedWeightsWarning as UninitializedWeightsWarning
from .errors import UnknownModelError as UnknownModelError
from .errors import UnsupportedModelError as UnsupportedModelError
from .errors import WireError as WireError
from .models import CacheInfo as CacheInfo
from .models import Explanation as Explanation
from .models import InferenceStats as InferenceStats
from .models import StreamingBaseModel as StreamingBaseModel
from .models import StreamingBertModel as StreamingBertModel
from .models import StreamingGPTModel as StreamingGPTModel
from .models import StreamingLlamaModel as StreamingLlamaModel
from .models import StreamingModel as StreamingModel
from .models import StreamingT5Model as StreamingT5Model
from .models import WeightClient as WeightClient
from .retry import RetryPolicy as RetryPolicy
from .server import AdvancedWeightServer as AdvancedWeightServer
from .server import ServerHealth as ServerHealth
from .server import ServerStats as ServerStats
from .server import WeightServer as WeightServer
from .settings import Settings as Settings
from .storage import FilesystemBackend as FilesystemBackend
from .storage import S3Backend as S3Backend
from .storage import StorageBackend as StorageBackend

__version__: str
