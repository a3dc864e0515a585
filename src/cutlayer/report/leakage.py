"""The results of an examination: tables for the terminal, JSON, and a grid of pictures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cutlayer.text import format_score

if TYPE_CHECKING:
    from torch import Tensor

    from cutlayer.leakage.active import Hijacked, Watched
    from cutlayer.leakage.assess import Examined, Finding

LEAKAGE_JSON, LEAKAGE_PICTURES = "leakage.json", "leakage.png"
_SHOWN = 10  # pictures in a row


def tables(findings: Sequence[Finding]) -> list[Table]:
    """Reconstruction, recovered tokens, and information, client by client."""
    return [_attacks(findings), _recovered(findings), _information(findings), _known(findings)]


def notes(findings: Sequence[Finding]) -> list[str]:
    """The assumptions behind the numbers: each sentence once."""
    from cutlayer.leakage.information import LEAST  # here, not above: it needs torch

    said: dict[str, None] = {}
    for f in findings:
        said |= dict.fromkeys(f"upper bound: {bound.reason}." for bound in f.upper)
        if any(math.isfinite(bound.nats) and bound.kind != "tokens" for bound in f.upper):
            said[
                f"{_name(f)}: bounds and attacks are for a sample that is sent once; each was sent {f.releases} times, "
                f"which reveal at most {f.releases} times the bound."
            ] = None
        if f.dependence is not None and f.usable is None and f.samples < LEAST:
            said[
                f"{_name(f)}: usable information cannot be read: {f.samples} samples are too few to code, {LEAST} "
                "are needed; train with fewer clients, or more samples per client."
            ] = None
        if f.privacy is not None:
            said[
                f"privacy: {f.privacy} It is about {f.privacy.protects}; not about {'; '.join(f.privacy.not_covered)}."
            ] = None
        for one in f.estimates:
            if not one.reliable or one.warning:
                said[f"{one}"] = None
        if (shown := f.labels) is not None:
            said[
                f"labels of {_name(f)}, from the gradients that go up: AUC {shown.norm_auc:.2f} by length (by chance "
                f"a little above 0.5), {shown.cosine_auc:.2f} by direction (0.5), {shown.cluster_accuracy:.0%} by "
                f"clusters (always the commonest: {shown.majority:.0%})"
            ] = None
        said |= dict.fromkeys(_missing(f.run, f.not_measured))
    return list(said)


def _missing(run: str, not_measured: Mapping[str, str]) -> list[str]:
    return [f"{_short(run)}: {what} not measured: {why}." for what, why in not_measured.items()]


def as_json(findings: Sequence[Finding], sentences: Sequence[str], hijacked: Sequence[Hijacked] = ()) -> str:
    """Everything, for programs; null means infinity."""
    found = {
        "findings": [f.plain for f in findings],
        "comparisons": list(sentences),
        "hijacked": [h.plain for h in hijacked],
    }
    return json.dumps(found, indent=1) + "\n"


def active(hijacked: Sequence[Hijacked]) -> Table:
    """The reconstructions of hijacking servers, and what clients notice."""
    table = Table(
        "run", "hijacker", "MSE", "mean input", "explained", "watch", "notice", "watch, honest server", "suspect it",
        title="An active server: feature-space hijacking, and what the clients' watch says",
    )  # fmt: skip
    for h in hijacked:
        table.add_row(
            f"{_short(h.run)}, {h.rounds} rounds, client {h.client}",
            _HIJACKS[h.labelled],
            f"{h.attack.mse:.4f}",
            f"{h.mean_input.mse:.4f}",
            f"{h.explained:.0%}",
            _scores(h.hijacked),
            _suspicious(h.hijacked),
            _scores(h.honest),
            _suspicious(h.honest),
        )
    return table


def active_notes(hijacked: Sequence[Hijacked]) -> list[str]:
    """The assumptions behind the table of an active server."""
    if not hijacked:
        return []
    from cutlayer.defences.watch import Watch  # here, not above: it needs torch

    said = [
        f"watch: how far labels explain the gradients that a client gets, 0.5 is chance; below {Watch().least:g} it is "
        "suspicious (notice: how many of the watching clients are suspicious; suspect it: the same for the honest "
        "server). A hijacker shares no gradients, in any algorithm."
    ]
    if not any(h.hijacked for h in hijacked):
        said.clear()
    said += dict.fromkeys(line for h in hijacked for line in _missing(h.run, h.not_measured))
    lost = [h for h in hijacked if h.explained < 0]
    if lost:
        said.append(
            "explained below 0: the hijacker's decoder does worse than one who always answers with the mean input. It "
            f"had {min(h.rounds for h in lost)} rounds to bend the clients; longer runs, deeper cuts and knowing "
            "labels help it, and an honest-but-curious server may well read more."
        )
    return said


_NOT = "not measured"
_HIJACKS = {False: "ignores labels", True: "knows labels"}


def _scores(watched: Sequence[Watched]) -> str:
    if not watched:
        return _NOT
    scores = [w.score for w in watched if w.score is not None]
    return f"{min(scores):.2f} to {max(scores):.2f}" if scores else "nothing to see"


def _suspicious(watched: Sequence[Watched]) -> str:
    return f"{sum(w.suspicious for w in watched)} of {len(watched)}" if watched else _NOT


def pictures(
    examined: Sequence[Examined], hijacked: Sequence[tuple[Hijacked, Mapping[str, Tensor]]] = ()
) -> bytes | None:
    """A PNG: inputs, and below them the attackers' reconstructions. None if inputs are not pictures."""
    shown = [e for e in examined if e.pictures and _are_pictures(next(iter(e.pictures.values())).inputs)]
    if not shown:
        return None
    from matplotlib.figure import Figure

    rows: list[tuple[str, Tensor, Tensor]] = []
    for e in shown:
        name = _name(e.finding)
        first = next(iter(e.pictures.values()))
        rows.append((f"{name}\ninputs", first.inputs, first.inputs))
        for knowledge, p in e.pictures.items():
            share = p.report.explained
            rows.append((f"knows the {_KNOWS[knowledge]}\n{share:.0%} explained", p.reconstructions, first.inputs))
    for h, found in hijacked:
        x = found["inputs"]
        if x.shape != rows[-1][2].shape or not bool((x == rows[-1][2]).all()):  # else they stand above already
            rows.append((f"{_short(h.run)}, client {h.client}\ninputs", x, x))
        rows.append((f"hijacker that {_HIJACKS[h.labelled]}\n{h.explained:.0%} explained", found["reconstructions"], x))
    figure = Figure(figsize=(0.8 * _SHOWN + 2.6, 0.85 * len(rows)))
    axes = figure.subplots(
        len(rows),
        _SHOWN + 1,
        squeeze=False,
        gridspec_kw={"width_ratios": [2.6, *[1] * _SHOWN]},
    )
    for line, (label, made, inputs) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        line[0].text(0, 0.5, label, va="center", fontsize=8)
        low, high = float(inputs.min()), float(inputs.max())
        for ax, picture in zip(line[1:], made, strict=False):
            ax.imshow(_picture(picture, low, high), cmap="gray", vmin=0, vmax=1)
    figure.tight_layout(pad=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


_KNOWS = {"model": "client part", "smashed": "smashed data only"}


def _are_pictures(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in (1, 3)


def _picture(x: Tensor, low: float, high: float) -> Any:
    """[c, h, w] -> [h, w] or [h, w, 3], in [0, 1]."""
    unit = ((x - low) / ((high - low) or 1)).clamp(0, 1).numpy()
    return unit[0] if len(unit) == 1 else unit.transpose(1, 2, 0)


def _name(f: Finding) -> str:
    return f"{_short(f.run)}, round {f.rounds}, client {f.client}"


def _short(run: str) -> str:
    return run.rstrip("/").rsplit("/", 1)[-1]


def _attacks(findings: Sequence[Finding]) -> Table:
    columns = [
        "run",
        "test",
        "attacker knows",
        "MSE",
        "mean input",
        "nearest",
        "PSNR",
        "SSIM",
        "explained",
        "classified",
        "truly",
    ]
    table = Table(*columns, title="Reconstruction of private inputs by the server")
    for f in findings:
        score = "" if f.score is None else format_score(f.metric, f.score, share=f.share)
        for knowledge, r in f.attacks.items():
            similar = "" if r.attack.ssim is None else f"{r.attack.ssim:.2f}"
            table.add_row(
                _name(f),
                score,
                _KNOWS[knowledge],
                f"{r.attack.mse:.4f}",
                f"{r.mean_input.mse:.4f}",
                f"{r.nearest.mse:.4f}",
                f"{r.attack.psnr:.1f} dB",
                similar,
                f"{r.explained:.0%}",
                _NOT if r.attack.accuracy is None else f"{r.attack.accuracy:.0%}",
                _NOT if r.true_accuracy is None else f"{r.true_accuracy:.0%}",
            )
    return table


def _recovered(findings: Sequence[Finding]) -> Table:
    table = Table(
        "run", "test", "attack", "attacker knows", "rows", "tokens", "recovered", "unigram guesser",
        title="Tokens that the server recovers",
    )  # fmt: skip
    for f in findings:
        score = "" if f.score is None else format_score(f.metric, f.score, share=f.share)
        for r in f.recovered:
            table.add_row(
                _name(f),
                score,
                r.attack,
                {"model": "client part", "smashed": "client part at the start"}[r.knowledge],
                str(r.rows),
                str(r.tokens),
                f"{r.accuracy:.1%}",
                f"{r.unigram:.1%}",
            )
    return table


def _information(findings: Sequence[Finding]) -> Table:
    table = Table(
        "run", "at most, once", "usable", "95 %", "bits per value", "distance correlation", "unbiased", "linear R2",
        title="Information about private inputs, nats per sample",
    )  # fmt: skip
    for f in findings:
        if f.dependence is None:
            continue
        most = min((bound.nats for bound in f.upper), default=math.inf)
        u = f.usable
        table.add_row(
            _name(f),
            "infinite" if math.isinf(most) else f"{most:.1f}",
            *(
                ("", "", "")
                if u is None
                else (f"{u.nats:.2f}", f"{u.low:.2f} to {u.high:.2f}", f"{u.bits_per_dimension:.3f}")
            ),
            f"{f.dependence.distance_correlation:.3f}",
            f"{f.dependence.unbiased_squared:.3f}",
            f"{f.dependence.linear_r2:.3f}",
        )
    return table


def _known(findings: Sequence[Finding]) -> Table:
    table = Table(
        "run",
        "estimator",
        "reads",
        "shuffled",
        "ceiling",
        "known answers: truth -> reading",
        "error",
        "to be trusted",
        title="Estimates, nats, beside what they read where the answer is known",
    )
    for f in findings:
        for one in f.estimates:
            known = ", ".join(f"{k.case} {k.truth:.2f} -> {k.reading:.2f}" for k in one.known)
            trust = "yes" if one.reliable else "no"
            null, cap = ("" if v is None else f"{v:.2f}" for v in (one.null, one.cap))
            table.add_row(_name(f), one.name, f"{one.reading:.2f}", null, cap, known, f"{one.error:.2f}", trust)
    return table
