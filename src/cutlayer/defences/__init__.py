"""What clients do to smashed data before it leaves them, one file per defence, and how they watch the server."""

from cutlayer.defences.base import Defence, defence
from cutlayer.defences.pipeline import Defences, of

__all__ = ["Defence", "Defences", "defence", "of"]
