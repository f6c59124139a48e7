"""Tags and notes of runs: what is allowed, and that they are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtx_lab import Run
from qtx_lab.errors import ArgumentError, StorageError
from qtx_lab.experiments.annotations import ANNOTATIONS, Annotations, read_annotations, write_annotations
from qtx_lab.specs import NotebookSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Run.create(NotebookSpec(notebook="x"), "x", tmp_path) as run:
        pass
    return run.path


def test_what_was_written_is_read_and_the_manifest_stays(folder: Path) -> None:
    manifest = (folder / "manifest.json").read_bytes()
    assert read_annotations(folder) == Annotations()
    first = Annotations.of_text(" paper , figure 2,, paper", "Seeds agree.\nÄ «…»\n")
    assert first == Annotations(("paper", "figure 2"), "Seeds agree.\nÄ «…»")
    write_annotations(folder, first, old=Annotations())
    assert read_annotations(folder) == first
    write_annotations(folder, Annotations(), old=first)
    assert read_annotations(folder) == Annotations()
    assert (folder / "manifest.json").read_bytes() == manifest


def test_nothing_is_written_over_what_another_one_wrote(folder: Path) -> None:
    write_annotations(folder, Annotations(("mine",)), old=Annotations())
    with pytest.raises(StorageError, match="changed by somebody else"):
        write_annotations(folder, Annotations(("theirs",)), old=Annotations())
    assert read_annotations(folder).tags == ("mine",)


def test_a_write_that_fails_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Annotations(("old",))
    write_annotations(folder, old, old=Annotations())
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match="free some space"):
            write_annotations(folder, Annotations(("new",)), old=old)
    assert read_annotations(folder) == old
    assert sorted(path.name for path in folder.glob(f"*{ANNOTATIONS}*")) == [ANNOTATIONS]
    assert not list(folder.glob(".*.tmp"))


def test_only_runs_are_annotated(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not a run"):
        write_annotations(tmp_path, Annotations(), old=Annotations())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tags", "note", "match"),
    [
        (("a,b",), "", "without a comma"),
        (("",), "", "1 to 40"),
        (("x" * 41,), "", "1 to 40"),
        ((" x",), "", "white space"),
        (("a\nb",), "", "printable"),
        (("a", "a"), "", "named once"),
        (tuple(map(str, range(21))), "", "at most 20"),
        ((), "x" * 10_001, "at most 10,000"),
        ((), "\ud800", "text that a file can hold"),
    ],
)
def test_what_is_not_allowed_is_named(tags: tuple[str, ...], note: str, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Annotations(tags, note)


@pytest.mark.parametrize(
    "content", ["{nope", "[]", "{}", '{"tags": 3, "note": ""}', '{"tags": ["a,b"], "note": ""}']
)
def test_a_broken_file_is_an_error_of_its_own(folder: Path, content: str) -> None:
    (folder / ANNOTATIONS).write_text(content)
    with pytest.raises(StorageError, match="no tags and note"):
        read_annotations(folder)
