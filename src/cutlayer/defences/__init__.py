"""What clients do to smashed data before it leaves them, one file per defence, and how they watch the server."""

from cutlayer.defences.pipeline import Defences, of
from cutlayer.defences.protection import Defence, defence

__all__ = ["Defence", "Defences", "defence", "of"]
