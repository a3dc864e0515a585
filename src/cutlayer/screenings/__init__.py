"""What the server does to the rows that clients send, before it uses them: one file per screening."""

from cutlayer.screenings.filtering import Screening, screening

__all__ = ["Screening", "screening"]
