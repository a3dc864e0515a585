"""Cutlayer as a Flower app: Flower finds the nodes and starts the run, the tensors flow over Cutlayer's own streams.

`app.py` holds what Flower loads, the ServerApp `server` and the ClientApp `client`; `options.py` reads the run's
configuration; `invitation.py` is what Flower's messages carry; `replies.py` listens for the ClientApps' answers.
"""

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flwr":
        raise
    raise ModuleNotFoundError(
        "Cutlayer as a Flower app needs Flower: install the extra, pip install 'cutlayer[flower]'", name="flwr"
    ) from None
