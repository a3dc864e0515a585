"""How values are searched for when a comparison tunes its methods: one file per strategy."""

from cutlayer.searches.searching import Answers, Leg, Search, Space, search

__all__ = ["Answers", "Leg", "Search", "Space", "search"]
