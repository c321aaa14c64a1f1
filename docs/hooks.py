"""Puts the files of the repository's root into the site, so that each is written once. README.md is the front page."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files, config):
    """Add the pages. In the root they link to docs/x.md; in the site that is x.md."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_serve(server, config, builder):
    """`mkdocs serve` follows their changes too."""
    for source in PAGES.values():
        server.watch(str(ROOT / source))
    return server
