"""Configuration: dataclasses of ``option`` fields become grouped flags and YAML keys."""

from megatron_sip.config.fields import option
from megatron_sip.config.loader import Loaded, from_mapping, load, load_with_sources, save_yaml, to_yaml

__all__ = ["Loaded", "from_mapping", "load", "load_with_sources", "option", "save_yaml", "to_yaml"]
