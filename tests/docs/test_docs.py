"""Documentation: every code block of the README and of docs/ runs, page by page, each page in a folder of its own."""

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest, mock

import pytest
import torch.distributed as dist
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

import compaware_kernels as ck
from compaware_kernels.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def run_shell(example):
    """Lines of ``compaware`` run; of ``make`` the targets must exist; any other needs a ``skip`` with its reason."""
    for line in example.parsed.replace("\\\n", "").splitlines():
        program, *arguments = shlex.split(line, comments=True) or ["make"]
        if program == "make":
            assert TARGETS.issuperset(arguments), line
        else:
            assert program == "compaware", f"cannot run: {line}"
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


BLOCKS = Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", run_shell), SkipParser()])


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty folder; what a page leaves in the process is undone."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pages
def test_code_blocks_run(page, sandbox):
    for example in BLOCKS.parse(page):
        with suppress(SkipTest):
            example.evaluate()


@pages
def test_no_block_is_overlooked(page):
    text = page.read_text()
    assert {*re.findall(r"^ *```(.+)$", text, re.MULTILINE)} <= {"python", "bash", "text"}
    assert not re.search(r"skip: \w+ *-->", text), "a skipped block needs its reason"


def test_links_of_the_readme():  # those of docs/ are checked as the site is built
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_reference_has_every_public_name():
    reference = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    names = set(re.findall(r"^::: compaware_kernels\.(\w+)", reference, re.MULTILINE))
    assert names - {"integrations"} == set(ck.__all__)
