"""What hostile clients do in a simulation: one file per attack."""

from cutlayer.attacks.behaviour import Attack, Attacks, attack, of

__all__ = ["Attack", "Attacks", "attack", "of"]
