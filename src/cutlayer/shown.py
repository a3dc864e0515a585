"""A line that says how far training is. A notebook and a terminal rewrite it; a log gets one line after another."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self


class ShownLine:
    """The line, as a context manager. `show` replaces its text; with `keep`, the text also remains as a line of its
    own.
    """

    def __init__(self) -> None:
        self._notebook, self._length = _display(), 0
        self._place: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._length:
            sys.stderr.write("\n")

    def show(self, text: str, *, keep: bool = False) -> None:
        """Show `text` in place of the last text."""
        if self._notebook is not None:
            self._in_notebook({"text/plain": text})
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{text:<{self._length}}")
            self._length = len(text)
        elif keep:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _in_notebook(self, content: dict[str, str]) -> None:
        assert self._notebook is not None
        if self._place is None:
            self._place = self._notebook(content, raw=True, display_id=True)
        else:
            self._place.update(content, raw=True)


def _display() -> Any:
    """The display function of the notebook that this process belongs to; None outside a notebook."""
    shell = sys.modules.get("IPython")
    if shell is None or not hasattr(shell.get_ipython(), "kernel"):
        return None
    from IPython.display import display

    return display
