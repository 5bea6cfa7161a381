"""What data sets of pictures with captions have in common."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CAPTIONS = "captions.jsonl"

_RESERVED_SHARE = 10  # one of so many


def reserved(caption: str) -> bool:
    """Whether it is kept for evaluation, in whichever data set it comes; no training data holds it."""
    digest = hashlib.sha1(caption.strip().lower().encode(), usedforsecurity=False).hexdigest()
    return int(digest[:8], 16) % _RESERVED_SHARE == 0


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it once all went well, and else is gone."""
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        work.chmod(0o755)
        yield work
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Rows as JSON lines, beside the file and then renamed over it. Returns their number."""
    count = 0
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}-", delete=False
    ) as out:
        beside = Path(out.name)
        try:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            out.close()
            beside.chmod(0o644)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
    return count
