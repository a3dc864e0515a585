"""One line about a data set: what was read, used and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from cutlayer.data.samples import Source
from cutlayer.data.unsplit import Raw

_BROKEN = "broken link"


def account(raw: Raw, source: Source) -> str:
    """ "pets: 48 pictures (3x32x32) in 2 classes; 33 to train, 5 to validate, 10 to test; ..."."""
    parts = [_contents(raw, source), _split(source)]
    if source.owner_names:
        parts.append(f"{len(source.owner_names)} owners")
    if source.class_names:
        parts.append(_largest(source))
    if raw.left_out:
        parts.append(f"ignored {_listed(raw.left_out)}")
    return "; ".join([*(part for part in parts if part), *raw.remarks])


def _contents(raw: Raw, source: Source) -> str:
    rows = sum(len(part.y) for part in raw.parts().values())
    columns = f"{len(raw.columns)} column{'s' if len(raw.columns) > 1 else ''}"
    shapes = ["x".join(map(str, x.shape[1:])) for x in source.train.form.rows]
    shape = columns if raw.columns else ", ".join(shapes)
    classes = f" in {len(source.class_names)} classes" if source.class_names else ""
    return f"{raw.name}: {rows} {raw.rows} ({shape}){classes}"


def _split(source: Source) -> str:
    sizes = {"train": len(source.train), "validate": len(source.validation), "test": len(source.test)}
    held = [f"{size} to {what}" for what, size in sizes.items() if size]
    return "" if len(held) == 1 else ", ".join(held)


def _largest(source: Source) -> str:
    """The accuracy of always giving the same answer, as a reference for other accuracies."""
    tested = source.test if len(source.test) else source.train
    if tested.y.dim() != 1 or tested.y.is_floating_point() or bool((tested.y < 0).any()):
        return ""
    counts = torch.bincount(tested.y, minlength=source.classes)
    most = int(counts.argmax())
    where = "the test rows" if len(source.test) else "the rows"
    return f"the largest class, {source.class_names[most]!r}, has {int(counts[most]) / len(tested):.1%} of {where}"


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def ignored_files(files: Iterable[Path], what: str = "file") -> str:
    """ "12 files: 8 .heic, 4 broken links"; empty if there are none."""
    kinds = Counter(_kind(file) for file in files)
    if not kinds:
        return ""
    total = kinds.total()
    listed = ", ".join(f"{n} {kind}{'s' if kind == _BROKEN and n > 1 else ''}" for kind, n in kinds.most_common())
    return f"{total} {what}{'s' if total > 1 else ''}: {listed}"


def _kind(file: Path) -> str:
    if file.is_symlink() and not file.exists():
        return _BROKEN
    return file.suffix.lower() or "without a suffix"
