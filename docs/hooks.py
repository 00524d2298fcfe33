"""MkDocs hooks: formulas as MathML, the help of the command line, docstrings written for Sphinx."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
CURVES = "studies/fashion/curves.svg"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|class|mod|meth|attr):`([\w.]+)`")
EQUATION = re.compile(r"^( {4,})``(.+)``$", re.MULTILINE)  # a paragraph of its own
TWO_ENTRIES = re.compile(r"^( +)(\w+: .*?)[.;]?  (?=\w+: )", re.MULTILINE)  # of "Args:", on one line


def on_files(files, config):
    """The figure of bench/README.md, where the page that includes it looks for it."""
    files.append(File.generated(config, CURVES, abs_src_path=str(ROOT / "bench" / CURVES)))
    return files


def on_page_markdown(markdown, page, **_):
    """The help of every command in place of its marker."""
    if page.file.src_uri != "command-line.md":
        return markdown
    command = [sys.executable, "-m", "typer", "compaware_kernels.cli", "utils", "docs", "--name", "compaware"]
    usage = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return markdown.replace("<!-- compaware --help -->", usage[usage.index("## ") :])


def on_page_content(content, **_):
    """LaTeX to MathML, which browsers render without a script."""
    display = {"span": "inline", "div": "block"}
    return FORMULA.sub(lambda m: convert(html.unescape(m[2]), display=display[m[1]]), content)


class SphinxDocstrings(griffe.Extension):
    """Roles become links to the reference, or code where the name is internal; equations become code blocks; a class
    without a docstring has its base's."""

    def on_package(self, *, pkg, **_):
        public = set(map(str, pkg.exports))

        def link(match: re.Match) -> str:
            name = match[1].removeprefix("compaware_kernels.").lstrip(".")
            return f"[`{name}`][compaware_kernels.{name}]" if name.partition(".")[0] in public else f"`{name}`"

        def rewrite(owner: griffe.Object) -> None:
            if owner.is_class and not owner.docstring:
                inherited = next((base.docstring for base in owner.mro() if base.docstring), None)
                owner.docstring = inherited and griffe.Docstring(inherited.value, parent=owner)
            if owner.docstring:
                text = ROLE.sub(link, owner.docstring.value).replace("::\n", ":\n")
                owner.docstring.value = TWO_ENTRIES.sub(r"\1\2.\n\1", EQUATION.sub(r"\1\2", text))
            for member in owner.members.values():
                if not member.is_alias:
                    rewrite(member)

        rewrite(pkg)
