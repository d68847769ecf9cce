"""A page that reads beside its code: python results/annotate.py nd.py writes nd.html.

Docstrings and whole-line comments stand on the left, the code they belong to on the right. arXiv
ids are links; a loss shows its oracle. Without arguments: pages of all five scripts.
"""

import argparse
import ast
import os
import re
import textwrap
import tokenize
from html import escape
from pathlib import Path

from pygments import formatters, highlight
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / f"{name}.py" for name in ("nd", "sp", "dcd", "kd2m", "detect_nd")]
LABEL = r"\b(?:Args|Returns|Raises|(?:Default w|W)eights?|Reference)(?:, [A-Z]\w+)*:"
FORMULA = r"^(\S.*)\n(?=    (?:\w+ = |.*\S {3}))"  # an indented line after one that is not
LIGHT, DARK = (formatters.HtmlFormatter(style=s, nowrap=True) for s in ("default", "github-dark"))
CSS = f"{LIGHT.get_style_defs('.code')} @media (prefers-color-scheme: dark) {{"
CSS += DARK.get_style_defs(".code") + """ } :root { color-scheme: light dark }
body { margin: 0 auto; max-width: 96rem; font: 1rem/1.5 system-ui, sans-serif }
p, h2, pre { margin: 0 0 .6rem } h2 { font-size: 1.1rem } small { font-weight: 400; opacity: .7 }
code, pre { font: .9em/1.5 ui-monospace, Menlo, monospace } code { display: inline-block }
pre { padding: .6rem 1.25rem; overflow: auto } pre, .code { font-size: .8125rem; background: #8881 }
header, section { display: grid; grid-template-columns: minmax(19rem, 1fr) minmax(0, 52rem) }
header { grid-template-columns: 2fr 1fr } nav { columns: 12rem } nav a { display: block }
.prose { padding: .6rem 1.25rem; min-width: 0; overflow-wrap: anywhere }
section:has(h2) { border-top: 1px solid #8885 } section > pre { margin: 0 }
@media (max-width: 900px) { header, section { display: block } .prose:empty { display: none } }
"""  # fmt: skip


def split(source: str) -> list[list]:
    """Sections [line, name, prose, code]: from a definition or a comment block to the next."""
    lines, tree = source.splitlines(), ast.parse(source)
    comments, docstrings, names, sections = {}, {}, {}, [[1, "", [], []]]  # dicts by line number
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT and re.match(r"\s*#(?! fmt:)", token.line):
            comments[token.start[0]] = token.string[1:].removeprefix(" ")
    for node in [tree, *(node for node in ast.walk(tree) if hasattr(node, "decorator_list"))]:
        if text := ast.get_docstring(node):
            first, last = node.body[0].lineno, node.body[0].end_lineno
            docstrings |= dict.fromkeys(range(first, last + 1), "") | {first: "\n" + text}
        if node is not tree and (text or node in tree.body):
            names[min([node.lineno, *(d.lineno for d in node.decorator_list)])] = node.name
    for row, line in enumerate(lines, 1):
        code_above = any(not text.startswith("#") for text in sections[-1][3])  # not: fmt: off
        if code_above and (row in names or row in comments) or lines[row - 3 : row - 1] == ["", ""]:
            sections.append([row, "", [], []])
        _, name, prose, code = sections[-1]
        sections[-1][1] = names.get(row, name)
        text = comments.get(row, docstrings.get(row))
        if text is None and (line or code):
            code.append(line)
        else:
            prose.append(text or "")
    return sections


def to_html(text: str) -> str:
    """Paragraphs of a docstring or comment. What it indents, such as equations, stays as it is."""
    text = re.sub("-{9,}", "", escape(text, quote=False))
    # A blank line before labels and numbered items, after and before what is indented.
    for pattern in (rf"()\n(?= ?\d\. |{LABEL})", r"^( .*)\n(?=\S)", FORMULA):
        text = re.sub(pattern, r"\1\n\n", text, flags=re.M)
    blocks = [block for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip()]
    for i, block in enumerate(blocks):
        if block.startswith("    ") and "arXiv" not in block:
            blocks[i] = f"<pre>{textwrap.dedent(block)}</pre>"
            continue
        block = re.sub(LABEL, r"<b>\g<0></b>", " ".join(block.split()))
        block = re.sub(r"`(.+?)`|(--[a-z][\w-]*|-&gt;)", r"<code>\1\2</code>", block)
        link = r'<a href="https://arxiv.org/abs/\1">\g<0></a>'
        blocks[i] = "<p>" + re.sub(r"arXiv (\d+\.\d+)", link, block) + "</p>"
    return "\n".join(blocks)


def page(path: Path, out: Path) -> str:
    """The HTML of a script; links to the oracles are relative to the folder `out`."""
    sections, oracles = split(path.read_text(encoding="utf-8")), ROOT / "tests" / "oracles.py"
    tests, body = oracles.read_text(encoding="utf-8"), ""
    losses = {n.name: n for n in ast.parse(tests).body if isinstance(n, ast.FunctionDef)}
    links = " ".join(f'<a href="#{name}">{name}</a>' for _, name, *_ in sections if name)
    for row, name, prose, code in sections:
        left, right = to_html("\n".join(prose)), "\n".join(code).rstrip()
        if row == 1:  # the file's docstring, and a list of what is in it
            left = f'<div class="prose"><h1>{path.name}</h1>\n{left}</div>'
            body, left = f'<header>{left}\n<nav class="prose">{links}</nav></header>\n', ""
        if name:
            left = f'<h2 id="{name}">{name} <small>line {row}</small></h2>\n{left}'
        if name in losses:
            text = highlight(ast.get_source_segment(tests, losses[name]), PythonLexer(), LIGHT)
            link = f"{os.path.relpath(oracles, out)}#L{losses[name].lineno}"
            left += f'<details><summary>Its <a href="{link}">oracle</a>, in plain loops</summary>'
            left += f'<pre class="code">{text}</pre></details>'
        right = right and f'<pre class="code">{highlight(right, PythonLexer(), LIGHT)}</pre>'
        body += f'<section><div class="prose">{left}</div>\n{right}</section>\n'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>{path.name}</title><style>{CSS}</style>
<meta name="viewport" content="width=device-width"/></head><body>{body}</body></html>
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="*", type=Path, default=SCRIPTS)
    parser.add_argument("--out", type=Path, default=".", help="folder (default: the current one)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.scripts:
        if not path.is_file():
            parser.error(f"{path}: no such file")
        target = options.out / f"{path.stem}.html"
        target.write_text(page(path, options.out), encoding="utf-8")
        print(target)
