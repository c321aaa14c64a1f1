"""The front page of the site is README.md, so that both say the same."""

from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The Markdown of a page. README.md links to docs/x.md; seen from docs/ that is x.md."""
    return README.read_text().replace("](docs/", "](") if page.file.src_uri == "index.md" else markdown


def on_serve(server, config, builder):
    """`mkdocs serve` follows changes of the README too."""
    server.watch(str(README))
    return server
