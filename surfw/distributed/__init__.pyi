from .load import LoadReport as LoadReport
from .load import load_sharded as load_sharded
from .pipeline import StageModel as StageModel
from .pipeline import join_job as join_job
from .place import build_model as build_model
