"""Reading a source checkpoint, the first step of the way: a directory or hub id becomes names, shapes and byte ranges.

`layout` and `companions` know which files make a checkpoint, `shard` and `legacy` read one file each (only `legacy`
imports torch), `distributed_table` and `distributed` what the ranks of a job saved. `hub` brings files here, and
`reader` puts them together.
"""

from surfw.checkpoint.reader import Checkpoint, demo_checkpoint, open_checkpoint, open_directory
from surfw.checkpoint.shard import SourceTensor

__all__ = ["Checkpoint", "SourceTensor", "demo_checkpoint", "open_checkpoint", "open_directory"]
