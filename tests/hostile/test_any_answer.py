"""Whatever a client answers, the run continues without it or ends with a named error."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support import u_shaped  # type: ignore[import-not-found]
from test_hostile_clients import CULPRIT, HONEST, REMOTE  # type: ignore[import-not-found]
from test_remote import OWN, SMALL, Passing  # type: ignore[import-not-found]

from cutlayer.errors import CutlayerError
from cutlayer.options import RunConfig
from cutlayer.remote.carrier import Lost
from cutlayer.testing import in_memory
from cutlayer.wire import encode, encode_named
from cutlayer.wire import messages as m

NUMBERS = (0, 1, 2, 5, 7, 10, 1 << 31, (1 << 32) - 1)
FLOATS = (0.0, 1.0, -1.0, 1e-300, 1e30, 3e38, 1e300, float("inf"), float("nan"))
TYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)


class Liar(Passing):
    """The culprit's answers are replaced after both sides have checked their form, so only the cohort's own checks
    remain. `chance` decides on all lies.
    """

    def __init__(self, workers: Mapping[int, Any], chance: random.Random) -> None:
        super().__init__(workers)
        self.chance, self.lies = chance, 0

    def _ask(self, client: int, message: m.Message, body: Sequence[Any]) -> Any:
        answer = super()._ask(client, message, body)
        if client != CULPRIT or answer is None or isinstance(answer, Lost) or self.chance.random() < 0.5:
            return answer
        self.lies += 1
        lie, said = answer.message, bytes(answer.body)
        if self.chance.random() < 0.6:
            lie = self._message(lie)
        if self.chance.random() < 0.6:
            said = self._body(said)
        return answer._replace(message=lie, body=memoryview(said))

    def _message(self, message: Any) -> Any:
        """Change one field to another value of its type; other types could not be read."""
        kind, chance = type(message), self.chance
        made: dict[str, Any] = {}
        for name in message.__struct_fields__:
            value = getattr(message, name)
            if isinstance(value, int):
                made[name] = chance.choice(NUMBERS)
            elif isinstance(value, float):
                made[name] = chance.choice(FLOATS)
            elif name == "losses":
                steps = [(chance.choice(FLOATS), chance.choice(NUMBERS), abs(chance.choice(FLOATS))) for _ in value]
                made[name] = chance.choice([steps, steps[1:], [], [(1.0, 1, 1.0)] * 1000])
            elif name == "scores":
                made[name] = chance.choice([{}, {"loss": None}, {k: chance.choice([None, [1.0], 2.0]) for k in value}])
        name = chance.choice(sorted(made)) if made else None
        return kind(
            **{n: getattr(message, n) for n in message.__struct_fields__} | ({name: made[name]} if name else {})
        )

    def _body(self, body: bytes) -> bytes:
        """Other tensors, or bytes that are not tensors."""
        chance = self.chance
        way = chance.randrange(5)
        if way == 0 or not body:
            return b""
        if way == 1:
            return chance.randbytes(chance.randrange(1, 200))
        if way == 2:
            changed = bytearray(body)
            for _ in range(chance.randrange(1, 9)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            return bytes(changed)
        shape = [chance.choice((0, 1, 5, 128)) for _ in range(chance.randrange(4))]
        tensor = torch.full(shape, 1.0).to(chance.choice(TYPES))
        if way == 3:
            return b"".join(encode([tensor] * chance.randrange(1, 4)))
        return b"".join(encode_named({"lower.hidden1.weight": tensor, "x": tensor}))


@pytest.mark.parametrize(("algorithm", "seed"), [*((a, 0) for a in REMOTE), ("ssl", 1), ("sflv2", 1)])
def test_any_answer(algorithm: str, seed: int) -> None:
    cuts = {"cut": "hidden1", "tail_cut": "hidden2"} if u_shaped(algorithm) else {}
    config = RunConfig.of({**SMALL, "algorithm": algorithm, **OWN.get(algorithm, cuts), "batch": 5, "rounds": 4})
    hubs: list[Liar] = []

    def carrier(workers: Mapping[int, Any]) -> Liar:
        hubs.append(Liar(workers, random.Random(f"{algorithm}/{seed}")))
        return hubs[0]

    told: list[tuple[str, Any]] = []
    there = in_memory(
        config, carrier=carrier, gone=lambda: hubs[0].gone, faulty="readmit", tell=lambda *what: told.append(what)
    )
    hubs[0].greet = there.greet
    try:
        records = list(there.run)
    except CutlayerError:  # a named error is enough if everything travels through the lying client
        records = []
    assert hubs[0].lies
    assert {facts["client"] for word, facts in told if word in ("garbage", "failed", "excluded")} <= {CULPRIT}
    if not there.run.training.algorithm.traits.takes_turns:
        assert records
        assert set(HONEST) <= {k for record in records for k in record.clients}
