"""The whole configuration: its schema (`models`, `training`, `sections`), its checks, and how it is put together (`loading`)."""

from so3krates_dist.config.loading import (
    GROUPS,
    describe_left_out,
    dump_config,
    find_configs,
    list_keys,
    load_config,
    parse_config,
    read_config,
    to_plain,
)
from so3krates_dist.config.models import (
    DEFAULT_MODEL,
    MODEL_SECTIONS,
    EuclideanTransformerSection,
    GeomAttEnvelopeSection,
    GeomAttSection,
    ModelSection,
    So3kratesSection,
    So3lrSection,
)
from so3krates_dist.config.sections import DataSection, MetricsSection, RunConfig, RunSection
from so3krates_dist.config.training import LOSS_WEIGHTS, TrainSection

__all__ = [
    "DEFAULT_MODEL",
    "GROUPS",
    "LOSS_WEIGHTS",
    "MODEL_SECTIONS",
    "DataSection",
    "EuclideanTransformerSection",
    "GeomAttEnvelopeSection",
    "GeomAttSection",
    "MetricsSection",
    "ModelSection",
    "RunConfig",
    "RunSection",
    "So3kratesSection",
    "So3lrSection",
    "TrainSection",
    "describe_left_out",
    "dump_config",
    "find_configs",
    "list_keys",
    "load_config",
    "parse_config",
    "read_config",
    "to_plain",
]
