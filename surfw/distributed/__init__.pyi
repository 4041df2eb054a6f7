from .load import LoadReport as LoadReport
from .load import load_sharded as load_sharded
from .place import build_model as build_model
