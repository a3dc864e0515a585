"""Data sets: loaded, split, and dealt to clients."""

from cutlayer.data.built_in import data_set
from cutlayer.data.formats import Format, data_format
from cutlayer.data.partitions import Partition, class_counts, partition, partition_scheme
from cutlayer.data.preprocessed import preprocessed
from cutlayer.data.samples import Samples, Source
from cutlayer.data.sources import from_arrays, from_dataset, from_memory, load, load_whole
from cutlayer.data.unsplit import Raw, Section

__all__ = [
    "Format",
    "Partition",
    "Raw",
    "Samples",
    "Section",
    "Source",
    "class_counts",
    "data_format",
    "data_set",
    "from_arrays",
    "from_dataset",
    "from_memory",
    "load",
    "load_whole",
    "partition",
    "partition_scheme",
    "preprocessed",
]
