"""How a run reports while it trains: the user's callbacks, and loggers, one file each."""

from cutlayer.loggers.audience import Audience
from cutlayer.loggers.listening import Callback, Logger, RunStart, logger

__all__ = ["Audience", "Callback", "Logger", "RunStart", "logger"]
