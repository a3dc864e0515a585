"""Recovery of tokens: all after an embedding, none under strong noise, one by one after a decoder block."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import call
from torch import Tensor

from cutlayer import ConfigError, DataError, Run
from cutlayer.data.samples import Samples
from cutlayer.leakage import inversion as inverting
from cutlayer.leakage import prefix_search
from cutlayer.leakage.active import check_hijackable
from cutlayer.leakage.assess import Asked, check, examine
from cutlayer.leakage.recovery import counting_places, recover
from cutlayer.leakage.seen import Seen, Words
from cutlayer.leakage.subject import Subject, moments, subjects
from cutlayer.options import RunConfig
from cutlayer.tasks.tokens import TokenPrediction

VOCABULARY, LENGTH, WIDTH, FILLING = 12, 6, 16, 0
MODELS = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.between, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12)
    def forward(self, input_ids):
        if input_ids.min() < 0:  # as in models of language, which cannot be cut by tracing
            raise ValueError
        return self.head(torch.relu(self.between(self.embed(input_ids))))

class Masked(Words):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids) * attention_mask[..., None]
"""
MASKED = """
import torch
from cutlayer.data.samples import Samples, Source

def load():
    ids = torch.randint(1, 12, (100, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, :4] = 0
    every = Samples({"input_ids": ids * mask, "attention_mask": mask}, torch.where(mask > 0, ids, -100))
    return Source("masked", every[:40], every[40:60], every[60:], ())
"""


def texts(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, with low ones more common, and the next tokens. Every other row has three tokens and padding."""
    found = np.random.default_rng(0).integers(1, VOCABULARY, (2, rows, LENGTH)).min(0)
    follow = np.roll(found, -1, 1)
    follow[:, -1] = -100
    found[::2, 3:], follow[::2, 2:] = FILLING, -100
    return found, follow


def subject(folder: Path, **options: Any) -> Subject:
    folder.mkdir(exist_ok=True)
    x, y = texts(200)
    np.savez(folder / "data.npz", x=x, y=y)
    (folder / "models.py").write_text(MODELS)
    given: dict[str, Any] = {
        "data": str(folder / "data.npz"), "model": f"{folder / 'models.py'}:Words", "task": "tokens", "clients": 2,
        "rounds": 2, "batch": 4, "algorithm": "psl", "cut": "embed", "validation": 0, "test": 80,
    }  # fmt: skip
    given = {name: value for name, value in {**given, **options}.items() if value is not None}
    Run(RunConfig.of(given), out=folder / "run").run()
    (moment,) = moments(folder / "run")
    return next(iter(subjects(moment, 1, 40, None, 0)))


def test_an_embedding_gives_all_tokens_away(tmp_path: Path) -> None:
    """Measured by the command. Padding is not counted, and a guesser reaches the share of the commonest token."""
    s = subject(tmp_path)
    printed = call("leakage", str(tmp_path / "run"), "--samples", "40", "--clients", "1", "--attacks", "nearest").stdout
    (finding,) = json.loads((tmp_path / "run" / "leakage.json").read_text())["findings"]
    found = {(r["attack"], r["knowledge"]): r for r in finding["recovered"]}
    ids = s.samples.x
    commonest = s.auxiliary.x[s.auxiliary.x != FILLING].bincount().argmax()
    assert found["nearest", "model"]["accuracy"] == found["nearest", "smashed"]["accuracy"] == 1
    assert found["nearest", "model"]["tokens"] == int((ids != FILLING).sum())
    assert found["nearest", "model"]["unigram"] == pytest.approx(
        float((ids[ids != FILLING] == commonest).double().mean())
    )
    assert "100.0%" in printed
    assert "unigram" in printed
    assert "information not measured: inputs are tokens" in printed
    assert finding["upper"][0]["nats"] == pytest.approx(LENGTH * np.log(VOCABULARY))


def test_strong_noise_leaves_the_commonest_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverting, "_BUDGET", replace(inverting._BUDGET, steps=30))
    s = subject(tmp_path, clip=1.0, gaussian_noise=1000.0)
    nearest, inverted = examine(s, Asked(("model",))).finding.recovered
    assert nearest.accuracy < 0.3
    assert abs(inverted.accuracy - inverted.unigram) < 0.1
    assert inverted.unigram > 0.1


def test_an_inversion_model_learns_what_a_client_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping and a codec change the smashed data. An attacker that knows only the initial weights recovers less."""
    monkeypatch.setattr(inverting, "_BUDGET", replace(inverting._BUDGET, steps=60))
    s = subject(tmp_path, clip=1.0, up_codec="int8", client_lr=1.0, cut="between")
    known, guessed = (s.seen(begun=begun, seed=0) for begun in (False, True))
    words, counting = Words.of(s.samples.inputs), s.counting(s.samples)
    found = recover(known, words, counting, "inversion", "model")
    assert found is not None
    assert found.accuracy > 0.95
    assert known.scale() < 0.9 < 1.1 * s.z.flatten(1).norm(dim=1).max()  # clipped to 1
    nearest = [recover(seen, words, counting, "nearest", "") for seen in (known, guessed)]
    assert nearest[0] is not None
    assert nearest[1] is not None
    assert nearest[0].accuracy > 0.95 > nearest[1].accuracy
    start = s.moment.training.parts.client(words.ids)[0]
    assert torch.equal(s.begun_bare(words.ids), start)
    assert not torch.equal(s.bare(words.ids), start)


def mixing(words: Words, ahead: bool = False) -> Tensor:
    """A stand-in for a decoder block: embeddings plus four times the mean of the earlier ones (`ahead`: of all)."""
    table = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))
    own = table[words.ids]
    before = own.mean(1, keepdim=True) if ahead else (own.cumsum(1) - own) / torch.arange(1, LENGTH + 1)[None, :, None]
    return own + 4 * before


def test_a_decoder_is_read_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a block that mixes in context, nearest candidates are often wrong and the search finds all tokens.

    For an encoder, no search is possible.
    """
    monkeypatch.setattr(inverting, "_BUDGET", replace(inverting._BUDGET, steps=20))
    ids = torch.randint(0, VOCABULARY, (48, LENGTH), generator=torch.Generator().manual_seed(1))
    words, known, every = Words(ids[:8]), Words(ids[8:]), torch.ones(40, LENGTH, dtype=torch.bool)
    seen = Seen(mixing(words), None, known, every, mixing, mixing, VOCABULARY, 0)
    nearest, search = (recover(seen, words, every[:8], attack, "model") for attack in ("nearest", "search"))
    assert nearest is not None
    assert search is not None
    assert search.accuracy == 1 > 0.8 > nearest.accuracy

    def encoder(words: Words) -> Tensor:
        return mixing(words, ahead=True)

    monkeypatch.setattr(prefix_search, "_CANDIDATES", 1)  # if the likeliest does not fit, all others are tried
    again = recover(replace(seen, kept={}), words, every[:8], "search", "model")
    noisy = replace(seen, kept={}, client=lambda words: mixing(words) + 0.01)
    under_noise = recover(noisy, words, every[:8], "search", "model")
    assert again is not None
    assert under_noise is not None
    assert again.accuracy == 1 > under_noise.accuracy

    both = replace(seen, z=encoder(words), client=encoder, bare=encoder)
    assert recover(both, words, every[:8], "search", "model") is None


def test_an_encoder_is_known_though_its_rows_are_filled_up() -> None:
    """Masked padding after a text has no influence."""

    def masked(words: Words) -> Tensor:
        own = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0))[words.ids]
        assert words.mask is not None
        counts = words.mask[..., None]
        return own + (own * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True)

    ids = torch.randint(0, VOCABULARY, (48, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    words, known = Words(ids[:8], mask[:8]), Words(ids[8:], mask[8:])
    seen = Seen(masked(words), words.mask, known, known.mask != 0, masked, masked, VOCABULARY, 0)
    assert recover(seen, words, mask[:8] != 0, "search", "model") is None


def test_filling_is_told_from_text() -> None:
    """By the mask, by the padding token at places that are not learnt, or by equal tokens at the end."""
    ids, targets = torch.tensor([[5, 3, 3, 0, 0], [0, 4, 0, 0, 2]]), torch.full((2, 5), -100)
    targets[0, :2] = targets[1, :4] = 1
    task = TokenPrediction()
    for padding, last in ((0, False), (None, False)):
        found = counting_places(Samples(ids, targets), task, padding)
        assert found.tolist() == [[True, True, True, last, last], [True] * 5]
    one = Samples(torch.tensor([[1, 2, 9]]), torch.tensor([[2, 9, -100]]))  # a text's last token has no target
    assert counting_places(one, task, None).all()
    assert counting_places(one, task, 0).all()
    masked = Samples((ids, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])), targets)
    assert counting_places(masked, task, 0).sum(1).tolist() == [3, 5]
    assert counting_places(Samples(ids, torch.zeros(2)), task, 0).all()  # one label per text


def test_a_mask_goes_along(tmp_path: Path) -> None:
    """Rows are padded on the left, and the model receives a mask."""
    (tmp_path / "masked.py").write_text(MASKED)
    s = subject(
        tmp_path,
        data=f"{tmp_path / 'masked.py'}:load",
        validation=None,
        test=None,
        model=f"{tmp_path / 'models.py'}:Masked",
    )
    finding = examine(s, Asked(("smashed",), attacks=("nearest",))).finding
    (found,) = finding.recovered
    assert found.accuracy == 1
    assert found.tokens == int(dict(s.samples.inputs)["attention_mask"].sum())  # type: ignore[call-overload]


def test_what_cannot_be_looked_for_is_refused(tmp_path: Path) -> None:
    s = subject(tmp_path)
    with pytest.raises(DataError, match="one vector for each"):
        check(replace(s, z=s.z.flatten(1)), Asked())
    with pytest.raises(DataError, match="2 auxiliary rows of tokens, too few"):
        check(replace(s, auxiliary=s.auxiliary[:2]), Asked())
    with pytest.raises(ConfigError, match="its inputs are tokens"):
        check_hijackable(s.moment)
    with pytest.raises(ConfigError, match=r"'nearst'.*nearest"):
        Asked(attacks=("nearst",))
