from typing import Any

from absl.flags import FlagHolder
from ml_collections.config_dict import ConfigDict

def DEFINE_config_file(
    name: str, default: str | None = ..., help_string: str = ..., **options: Any
) -> FlagHolder[Any]: ...
def DEFINE_config_dict(
    name: str, config: ConfigDict, help_string: str = ..., **options: Any
) -> FlagHolder[Any]: ...
