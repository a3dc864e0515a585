"""One paper, one file. `base` says what an algorithm is, `common` holds what several share."""

from cutlayer.algorithms.contract import Algorithm, algorithm, steps_of, traffic_of, traits_of

__all__ = ["Algorithm", "algorithm", "steps_of", "traffic_of", "traits_of"]
