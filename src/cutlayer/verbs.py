"""The verbs of the seam, as words: what an algorithm needs, and what an engine can do.

An algorithm states its `needs`; an engine states what it `can`. The engine is chosen from these two sets, before
anything is trained. The methods of these names are `cohort.Cohort`'s (clients) and `server.Server`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Of the clients.
FORWARD = "forward"  # smashed data and labels go up
ARRIVALS = "arrivals"  # clients work at their own pace: those whose next batches arrive first
TAIL = "tail"  # U-shaped split: features go down, their gradients come up
BACKWARD = "backward"  # cut gradients go down; every client steps
BACKWARD_TOGETHER = "backward_together"  # the same; weight gradients go up, and every client steps with their sum
LEARN = "learn"  # local steps of the client part on the loss of an auxiliary head
ALIGN = "align"  # auxiliary heads that the server has fitted come down; clients do not train theirs
FIT = "fit"  # local training of whole models
AVERAGE = "average"  # client models go up, their weighted mean comes down
HAND_OVER = "hand_over"  # the one client model moves on

# Of the server.
STEP_EACH = "step_in_turn"  # one server model, stepped on one client's rows after another's
STEP_COPIES = "step_copies"  # a copy of the server model per client

CLIENT_VERBS = frozenset({FORWARD, ARRIVALS, TAIL, BACKWARD, BACKWARD_TOGETHER, LEARN, ALIGN, FIT, AVERAGE, HAND_OVER})
SERVER_VERBS = frozenset({STEP_EACH, STEP_COPIES})
VERBS = CLIENT_VERBS | SERVER_VERBS
_CONSTANTS = {word: name for name, word in globals().items() if name.isupper() and isinstance(word, str)}


def undeclared(algorithm: str, call: str, verb: str, needs: Iterable[str]) -> str:
    """The sentence for a `call` by an algorithm that does not name its `verb` among its needs."""
    return (
        f"{algorithm} calls {call}(), but its needs are {', '.join(sorted(needs)) or 'none'}: add {_CONSTANTS[verb]} "
        "(of cutlayer.verbs) to the needs of its registration"
    )


LEAVING = ("raw data", "smashed data", "labels", "gradients", "losses", "models")
"""What can leave a client, in the columns of the table in docs/security.md."""


@dataclass(frozen=True)
class Traits:
    """What follows from an algorithm's `needs`. `central`: the data of all clients are collected in one place first."""

    needs: frozenset[str]
    central: bool = False

    @classmethod
    def of(cls, needs: Iterable[str], central: bool = False) -> Traits:
        """Raises ValueError for a word that is not a verb."""
        found = frozenset(needs)
        if strangers := sorted(found - VERBS):
            raise ValueError(f"needs = {strangers[0]!r} is not a verb of the seam: they are {', '.join(sorted(VERBS))}")
        return cls(found, central)

    @property
    def whole(self) -> bool:
        """Clients hold whole models, so the cut plays no role."""
        return not self.needs & {FORWARD, LEARN}

    @property
    def split(self) -> bool:
        """The model is cut between client and server."""
        return not self.whole

    @property
    def u_shaped(self) -> bool:
        """Clients hold the last layers too; labels stay with them."""
        return TAIL in self.needs

    @property
    def lower_only(self) -> bool:
        """Clients hold the part below one cut, and nothing else."""
        return self.split and not self.u_shaped and LEARN not in self.needs

    @property
    def heads_come_down(self) -> bool:
        """Clients have auxiliary heads that the server fits. The heads are not trained by the clients that use them,
        and not averaged.
        """
        return ALIGN in self.needs

    @property
    def takes_turns(self) -> bool:
        """One client model travels, and one client works at a time."""
        return HAND_OVER in self.needs

    @property
    def asynchronous(self) -> bool:
        """Clients work at their own pace and do not wait for each other; their work continues from round to round."""
        return ARRIVALS in self.needs

    @property
    def server_copies(self) -> bool:
        """The server keeps a copy of its model per client."""
        return STEP_COPIES in self.needs

    @property
    def averages(self) -> bool:
        """Client models are averaged."""
        return AVERAGE in self.needs

    @property
    def models_cross(self) -> bool:
        """Client models leave their clients, which then have equal ones: models are averaged, or one model travels."""
        return self.averages or self.takes_turns

    @property
    def gradients_cross(self) -> bool:
        """Gradients of the clients' weights leave the clients, whose models stay equal because they take the same
        steps.
        """
        return BACKWARD_TOGETHER in self.needs

    @property
    def server_sees_one_client(self) -> bool:
        """A forward pass of the server has the rows of a single client."""
        return bool(self.needs & {STEP_EACH, STEP_COPIES, HAND_OVER})

    @property
    def one_cut(self) -> str:
        """Why all clients must have the same cut, in a sentence without its end; empty if each can have its own."""
        if self.whole:
            return "its clients hold whole models"
        if self.takes_turns:
            return "one client model travels from client to client"
        if self.u_shaped:
            return "its clients hold the last layers too"
        if self.gradients_cross:
            return "all clients step with the sum of their weight gradients, so that they hold the same layers"
        if self.asynchronous:
            return "its clients work at their own pace, so that some compute while others are averaged"
        return "its clients train on auxiliary heads, which are made for one cut" if LEARN in self.needs else ""

    @property
    def one_rank(self) -> str:
        """Why the adapters of all clients must have the same rank, in a sentence without its end; empty if those of
        each client can have their own.
        """
        if HAND_OVER in self.needs:
            return "its one model goes from client to client"
        if BACKWARD_TOGETHER in self.needs:
            return "its clients step with the sum of their gradients"
        return "its clients have auxiliary heads" if LEARN in self.needs else ""

    @property
    def mixes_cuts(self) -> bool:
        """Each client can have a cut of its own."""
        return not self.one_cut

    @property
    def leaving(self) -> dict[str, str]:
        """What leaves a client during training, in the words of `LEAVING`, and when. What stays with the client is not
        listed.
        """
        if self.central:
            return {"raw data": "every row, once"}
        found: dict[str, str] = {}
        if FORWARD in self.needs:
            found["smashed data"] = "every row, in each epoch"
            if not self.u_shaped:
                found["labels"] = "every row"
        if self.u_shaped:
            found["gradients"] = "of the loss by the server's features"
        if self.gradients_cross:
            found["gradients"] = "of the loss by the client's weights, in each step"
        if self.needs & {TAIL, FIT, LEARN}:
            found["losses"] = "the mean of each batch"
        if self.models_cross:
            part = "whole model" if self.whole else "client part"
            found["models"] = f"the {part}, at each {'hand-over' if self.takes_turns else 'averaging'}"
        return {word: found[word] for word in LEAVING if word in found}

    @property
    def arriving(self) -> tuple[str, ...]:
        """What a client receives during training, besides the rows and results of evaluation."""
        if self.central:
            return ()
        found = ["cut gradients"] if self.needs & {BACKWARD, BACKWARD_TOGETHER} else []
        found += ["the server's features"] if self.u_shaped else []
        if self.gradients_cross:
            found.append("the sum of all clients' weight gradients")
        if self.heads_come_down:
            found.append("its auxiliary head")
        if self.averages:
            found.append("the averaged model")
        return (*found, "the model of the client before") if self.takes_turns else tuple(found)
