"""Read a source checkpoint: a directory or hub id yields tensor names, shapes and byte ranges.

`layout` and `companions` determine which files belong to a checkpoint. `shard` and `legacy` read one file each (only
`legacy` imports torch); `distributed_table` and `distributed` read what the ranks of a job saved. `hub` downloads
files, and `reader` combines all of these.
"""

from surfw.checkpoint.reader import Checkpoint, demo_checkpoint, open_checkpoint, open_directory
from surfw.checkpoint.shard import SourceTensor

__all__ = ["Checkpoint", "SourceTensor", "demo_checkpoint", "open_checkpoint", "open_directory"]
