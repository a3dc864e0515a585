"""The documented table of what leaves a client is compared with the messages that clients send."""

from __future__ import annotations

from typing import Any

import pytest
from support import ALGORITHMS  # type: ignore[import-not-found]
from test_remote import OWN, SMALL, remote  # type: ignore[import-not-found]

from cutlayer.options import RunConfig
from cutlayer.verbs import LEAVING
from cutlayer.wire import messages as m

WORDS: dict[type[m.Message], set[str]] = {
    m.SmashedUp: {"smashed data"},
    m.TailUp: {"gradients", "losses"},
    m.Fitted: {"losses"},
    m.ModelUp: {"models"},
    m.GradientUp: {"gradients"},
}
PLAIN = {m.Settled, m.EvaluationRows, m.Saved}
"""Answers that clients give in every algorithm, and that reveal nothing about the training data."""


@pytest.mark.parametrize("name", [a for a in ALGORITHMS if a != "cl"])
def test_what_leaves_a_client(name: str) -> None:
    config = RunConfig(algorithm=name, **{**SMALL, "rounds": 2, **OWN.get(name, {})})
    run, hub = remote(config)
    sent: set[type[m.Message]] = set()
    left: set[str] = set()
    answer = hub.answer

    def watched(client: int, frame: Any) -> Any:
        if isinstance(frame.message, m.Forward) and frame.message.labels:
            left.add("labels")
        said = answer(client, frame)
        if said is not None:
            sent.add(type(said[0]))
        return said

    hub.answer = watched  # type: ignore[method-assign]
    for _ in run:
        pass
    left |= {word for message in sent for word in WORDS.get(message, set())}
    assert left == run.training.algorithm.traits.leaving.keys()
    optimiser = {m.OptimizerUp} if run.training.algorithm.traits.takes_turns else set()
    assert sent - WORDS.keys() - optimiser <= PLAIN
    assert list(run.training.algorithm.traits.leaving) == [word for word in LEAVING if word in left]


def test_centralised_learning_gathers_the_data() -> None:
    from cutlayer.algorithms.contract import traits_of
    from cutlayer.plugins import index

    assert traits_of(index("algorithm")["cl"]).leaving == {"raw data": "every row, once"}
