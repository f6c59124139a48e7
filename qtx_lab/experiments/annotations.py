"""Tags and a note of a run, which people write after it has ended; they lie beside the manifest."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, StorageError
from ..storage import json_bytes, write_atomic
from .manifest import MANIFEST

ANNOTATIONS = "annotations.json"
"""The file in the run's folder. The manifest stays as the run has written it."""

MAX_TAGS = 20
MAX_TAG_LENGTH = 40
MAX_NOTE_LENGTH = 10_000
"""Characters of a note, at most."""

_WRITING = threading.Lock()


@dataclass(frozen=True)
class Annotations:
    """What people have written about a run.

    Parameters
    ----------
    tags : tuple of str
        Short words by which runs are found, at most 20 of at most 40 characters; none holds a comma.
    note : str
        A text of at most 10,000 characters.

    Raises
    ------
    ArgumentError
        If a tag or the note is not allowed.

    Examples
    --------
    >>> Annotations(("paper", "figure 2"), "The seeds agree.").tags
    ('paper', 'figure 2')
    """

    tags: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for tag in self.tags:
            if (
                not 0 < len(tag) <= MAX_TAG_LENGTH
                or tag != tag.strip()
                or not tag.isprintable()
                or "," in tag
            ):
                raise ArgumentError(
                    f"tags: {tag!r} is not allowed: a tag has 1 to {MAX_TAG_LENGTH} printable characters, "
                    "without a comma or white space at its ends."
                )
        if len(self.tags) > MAX_TAGS or len(set(self.tags)) < len(self.tags):
            raise ArgumentError(f"tags={self.tags!r} is not allowed: at most {MAX_TAGS}, each named once.")
        if len(self.note) > MAX_NOTE_LENGTH:
            raise ArgumentError(
                f"note has {len(self.note):,} characters; at most {MAX_NOTE_LENGTH:,} are allowed."
            )
        try:
            "".join((*self.tags, self.note)).encode()
        except UnicodeEncodeError:
            raise ArgumentError("tags and note must be text that a file can hold.") from None

    @classmethod
    def of_text(cls, tags: str, note: str) -> Annotations:
        """Tags that are separated by commas, and a note.

        >>> Annotations.of_text("paper,  figure 2,", "").tags
        ('paper', 'figure 2')
        """
        words = (word.strip() for word in tags.split(","))
        return cls(tuple(dict.fromkeys(word for word in words if word)), note.strip())


def read_annotations(folder: Path) -> Annotations:
    """The annotations of a run; empty where nobody has written any.

    Raises
    ------
    StorageError
        If the file cannot be read.
    """
    path = folder / ANNOTATIONS
    try:
        content = json.loads(path.read_bytes())
        return Annotations(tuple(map(str, content["tags"])), str(content["note"]))
    except FileNotFoundError:
        return Annotations()
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # ArgumentError is a ValueError
        raise StorageError(f"{path} holds no tags and note: correct or delete it.") from error


def write_annotations(folder: Path, new: Annotations, *, old: Annotations) -> None:
    """Replace the annotations of a run, whole or not at all.

    Parameters
    ----------
    folder : Path
        The run's folder.
    new : Annotations
        What is to be written.
    old : Annotations
        What the writer has read: nothing is written over what another one has written meanwhile.

    Raises
    ------
    StorageError
        If the folder is no run, others have written meanwhile, or the file cannot be written.
    """
    with _WRITING:
        if not (folder / MANIFEST).is_file():
            raise StorageError(f"{folder} is not a run.")
        if read_annotations(folder) != old:
            raise StorageError(
                f"The tags or note of {folder.name} were changed by somebody else meanwhile: look at them "
                "first."
            )
        write_atomic(folder / ANNOTATIONS, json_bytes({"tags": list(new.tags), "note": new.note}))
