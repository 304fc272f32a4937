"""Progress bars of stages that may run beside each other on one terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE = "KIMIA_TRAINING_LINE"  # of the terminal that a stage's bars are drawn on, set by `training.micro`


def bar(things: Iterable[Any] | None = None, **words: Any) -> tqdm[Any]:
    """A progress bar over things, on a line of the stage's own; none where no terminal looks on. Words are tqdm's."""
    line = {"position": int(os.environ[LINE]), "leave": False} if LINE in os.environ else {}
    return tqdm(things, **{"disable": None, **line, **words})
