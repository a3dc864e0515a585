"""What is told of a run while it trains: callbacks of the user's, and loggers, one file each."""

from cutlayer.loggers.audience import Audience
from cutlayer.loggers.listening import Callback, Logger, RunStart, logger

__all__ = ["Audience", "Callback", "Logger", "RunStart", "logger"]
