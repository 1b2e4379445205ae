"""The site: it builds strictly and without a network, its pages are short, and what stands in them
to be typed is valid.
"""

from __future__ import annotations

import ast
import re
import socket

import pytest

from forgetless.options.verbs import VERBS
from pages import ROOT, blocks, check_shell, shell_lines

PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Words that a page may have.
LONGEST_PAGE = 1500


def named(path):
    return str(path.relative_to(ROOT / "docs"))


def test_it_builds_strictly_and_without_a_network(tmp_path, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def refused(*_, **__):
        raise OSError("a page asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(config)  # raises where a link, an anchor or a name of Python does not exist
    command_line = (tmp_path / "reference" / "cli.html").read_text("utf-8")
    for verb, row in VERBS.items():
        assert f'id="{verb}"' in command_line
        for name in row.options.__dataclass_fields__:
            assert row.shown(name) in command_line
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    assert {"index.html", "jobs/chat-model.html", "evidence/log.html"} <= pages
    for page in pages:
        loaded = re.findall(
            r'(?:src|href)="(https?:[^"]+\.(?:js|css|woff2?))"', text_of(page, tmp_path)
        )
        assert not loaded, f"{page} loads {loaded}"


def text_of(page, folder):
    return (folder / page).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_page_is_long(page):
    assert len(page.read_text("utf-8").split()) <= LONGEST_PAGE


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_stands_in_a_page_to_be_typed_is_valid(page):
    for line in shell_lines(page):
        check_shell(line)
    for block in blocks(page, "python"):
        ast.parse(block)
