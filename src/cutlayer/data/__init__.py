"""Data sets: loaded, split, and dealt to clients."""

from cutlayer.data.partitions import class_counts, partition
from cutlayer.data.samples import Samples, Source
from cutlayer.data.sources import from_arrays, from_dataset, load, load_whole

__all__ = ["Samples", "Source", "class_counts", "from_arrays", "from_dataset", "load", "load_whole", "partition"]
