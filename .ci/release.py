"""Makes a release: version, changelog, tag, wheel and source distribution, checked. Used by `make release`.

Without --commit everything is done in a copy that is thrown away, and what would change is shown.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHANGED = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command printed; its error ends the release."""
    process = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{process.stdout}{process.stderr}")
    return process.stdout


def replace_once(path: Path, pattern: str, new: str) -> None:
    """Replace the only place of a file that a pattern matches."""
    text, count = re.subn(pattern, lambda _: new, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if count != 1:
        sys.exit(f"{path.name} has {count} places that match {pattern!r}; a release changes exactly one.")
    path.write_text(text, encoding="utf-8")


def write_version(tree: Path, version: str, date: datetime.date) -> None:
    """Put a version and its date into pyproject.toml, CITATION.cff and CHANGELOG.md."""
    changelog = (tree / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"## [{version}]" in changelog:
        sys.exit(f"VERSION={version} is in CHANGELOG.md already: choose a later one.")
    unreleased = changelog.partition("## [Unreleased]")[2].partition("\n## [")[0]
    if "\n- " not in unreleased:
        sys.exit("CHANGELOG.md has nothing under [Unreleased]: there is nothing to release.")
    replace_once(tree / "pyproject.toml", r'^version = ".*"$', f'version = "{version}"')
    replace_once(tree / "CITATION.cff", r"^version: .*$", f"version: {version}")
    replace_once(
        tree / "CHANGELOG.md",
        r"^## \[Unreleased\]$",
        f"## [Unreleased]\n\n## [{version}] - {date.isoformat()}",
    )


def build(tree: Path, out: Path) -> None:
    """Build the distributions and check their metadata and contents."""
    run(sys.executable, "-m", "build", "--outdir", out, cwd=tree)
    files = sorted(out.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=tree)
    # W004: notebooks are data of the package and no modules, whose names may begin with a number.
    run("check-wheel-contents", "--ignore", "W004", *out.glob("*.whl"), cwd=tree)
    for file in files:
        print(f"built and checked: {file.name}, {file.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version")
    parser.add_argument("--commit", action="store_true", help="commit and tag in this checkout")
    parser.add_argument("--no-build", action="store_true", help="only show what would change")
    given = parser.parse_args()
    if not VERSION.fullmatch(given.version):
        sys.exit(f"VERSION={given.version} is not allowed: it must look like 0.2.0 or 0.2.0rc1.")
    if given.commit and run("git", "status", "--porcelain", cwd=ROOT):
        sys.exit("There are changes that are not committed: commit or stash them first.")
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        run("git", "-c", "safe.directory=*", "archive", "--output", f"{tree}.tar", "HEAD", cwd=ROOT)
        shutil.unpack_archive(f"{tree}.tar", tree)
        before = {name: (tree / name).read_text(encoding="utf-8") for name in CHANGED}
        write_version(tree, given.version, datetime.date.today())
        for name, text in before.items():
            after = (tree / name).read_text(encoding="utf-8")
            print(
                *difflib.unified_diff(text.splitlines(), after.splitlines(), name, name, lineterm=""),
                sep="\n",
            )
        if not given.no_build:
            build(tree, Path(scratch, "dist"))
    if not given.commit:
        print(f"Nothing was changed here. ARGS=--commit commits this and tags v{given.version}.")
        return
    write_version(ROOT, given.version, datetime.date.today())
    run("git", "commit", "--all", "--quiet", "--message", f"Version {given.version}", cwd=ROOT)
    run("git", "tag", "--annotate", f"v{given.version}", "--message", f"Version {given.version}", cwd=ROOT)
    build(ROOT, ROOT / "dist" / given.version)
    print(
        f"Tagged v{given.version}. Publish: git push --follow-tags, then twine upload dist/{given.version}/*."
    )


if __name__ == "__main__":
    main()
