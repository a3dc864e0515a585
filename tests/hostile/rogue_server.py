"""A server that accepts a client's own terms and then asks for what it should not get.

`python rogue_server.py PORT ATTACK...`: each attack has its own connection, and a line of JSON says how it ended. The
client is a real one. The attacks are after the model, labels, repeated batches, endless work, and the terminal of the
person who reads the client's messages.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cutlayer.remote.carrier import Lost, Request
from cutlayer.remote.hub import Hub
from cutlayer.remote.security import ServerSecurity
from cutlayer.wire import messages as m

PATIENCE = 60.0
ROUND: Request = (m.BeginRound(0, 2, 1.0, 3), ())
ESCAPES = "\x1b[2J\x1b[31mapproved\x07 [/] [bold]by\u202e all\nINFO client-0: fine"


@dataclass(frozen=True)
class Attack:
    """The requests in order, the error that the client should leave with, and words of the error's sentence."""

    asked: tuple[Request, ...]
    kind: str
    said: str


def asking(*messages: m.Message) -> tuple[Request, ...]:
    """Requests without bodies."""
    return tuple((message, ()) for message in messages)


FORWARDS = [m.Forward(step) for step in range(1, 101)]
ENDLESS = 1 << 53
NO, MORE = "ForbiddenError", "BudgetError"
ATTACKS: dict[str, Attack] = {
    "its model": Attack((ROUND, *asking(m.GiveModel(1))), NO, "GiveModel, which psl does not need"),
    "a model of mine": Attack((ROUND, *asking(m.TakeModel(1), m.Forward(1))), NO, "TakeModel, which psl"),
    "its optimiser": Attack(asking(m.GiveOptimizer(1)), NO, "GiveOptimizer, which psl"),
    "local training": Attack((ROUND, *asking(m.Fit(1))), NO, "Fit, which psl"),
    "the whole model's outputs": Attack(asking(m.Evaluate(1, "whole", 1)), NO, "part 'whole'"),
    "my part": Attack(asking(m.TakeServer(1, 1), m.Settle(1)), NO, "does not want"),
    "rows of its own": Attack(asking(m.OwnForward(1, 4, 0)), NO, "held out none"),
    "no round": Attack(asking(*FORWARDS), NO, "without a round begun"),
    "beyond the round": Attack((ROUND, *asking(*FORWARDS)), NO, "after all 3 batches"),
    "a batch of my choice": Attack((ROUND, *asking(m.Forward(1, True, 0))), NO, "batch number 0"),
    "an endless round": Attack(asking(m.BeginRound(0, 2, 1.0, ENDLESS), m.Settle(1)), NO, "batches, where"),
    "endless rounds": Attack(asking(m.BeginRound(0, ENDLESS, 1.0, 3), m.Settle(1)), MORE, "in this client's own file"),
    "rounds again and again": Attack((*[ROUND] * 30, *asking(m.Settle(1))), MORE, "rounds begun"),
}


class Rogue:
    """The server, at the given port."""

    def __init__(self, port: int = 0) -> None:
        self.hub = Hub(f"127.0.0.1:{port}", ServerSecurity(), self._admit)
        self.port = self.hub.start()

    def _admit(self, hello: m.Hello, identity: str | None) -> m.Welcome | m.Refused:
        return m.Welcome(int(hello.client.removeprefix("client-")), 2, 0, hello.terms)

    def attack(self, attack: Attack) -> Lost | list[Any]:
        """Attack the next client that connects, and return its answers or how it was lost."""
        (client,) = self.hub.wait_for(1, PATIENCE)
        self.hub.arrivals()
        found: Lost | list[Any] = []
        for start in range(0, len(attack.asked), 8):  # the largest number of requests that may wait for answers
            asked = attack.asked[start : start + 8]
            found = self.hub.exchange({client: asked}, deadline=PATIENCE, on_answer=lambda k, frame: frame)[client]
            if isinstance(found, Lost):
                break
        return found

    def close(self) -> None:
        """Hang up with a farewell that contains escape sequences for a terminal."""
        self.hub.stop(ESCAPES, 2)


def main(port: int, names: Iterable[str]) -> None:
    """Run the attacks in order, and print a line for each."""
    rogue = Rogue(port)
    for name in names:
        lost = rogue.attack(ATTACKS[name])
        facts = {"kind": lost.kind, "sentence": lost.sentence} if isinstance(lost, Lost) else {"answers": len(lost)}
        sys.stdout.write(json.dumps({"attack": name, **facts}) + "\n")
        sys.stdout.flush()
        while rogue.hub.present:
            time.sleep(0.01)
    rogue.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
