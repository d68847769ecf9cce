"""The pages of results/annotate.py show all of a script, and need no other file and no network."""

import os
import re
import subprocess
import sys
import tokenize
from xml.etree import ElementTree

import oracles
import pytest
from helpers import ROOT

pytestmark = pytest.mark.parametrize("script", oracles.ALL.split())
LEFT_OUT = re.compile(r"[\s`]|-{9,}")  # a page has other spaces, no backticks, no rules of dashes


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages")
    subprocess.run([sys.executable, ROOT / "results/annotate.py", "--out", out], check=True)
    return out


def test_a_page_has_all_of_its_script_in_order(pages, script):
    tree = ElementTree.parse(pages / f"{script}.html")  # an error unless it is well formed
    lines, words, position = (ROOT / f"{script}.py").read_text().splitlines(), [], 0
    for token in tokenize.generate_tokens(iter([f"{line}\n" for line in lines]).__next__):
        if re.match(r'#(?! fmt:)|"""', token.string) and not token.line[: token.start[1]].strip():
            words += [LEFT_OUT.sub("", line) for line in token.string.strip('#"').splitlines()]
            lines[token.start[0] - 1 : token.end[0]] = [""] * len(token.string.splitlines())
    code = "".join("".join(node.itertext()) for node in tree.iterfind(".//section/pre"))
    prose = "".join("".join(node.itertext()) for node in tree.iterfind(".//div"))
    assert LEFT_OUT.sub("", code) == LEFT_OUT.sub("", "".join(lines))
    for line in words:
        position = LEFT_OUT.sub("", prose).index(line, position) + len(line)


def test_a_page_stands_alone_and_links_papers_and_oracles(pages, script):
    tree = ElementTree.parse(pages / f"{script}.html")
    assert not {"link", "script", "img", "iframe"} & {node.tag for node in tree.iter()}
    assert not re.search(r"@import|url\(", tree.findtext("head/style"))
    links = {node.get("href") for node in tree.iter("a")}
    names = [node.get("id") for node in tree.iter("h2")]
    papers = re.findall(r"arXiv (\d+\.\d+)", (ROOT / f"{script}.py").read_text())
    expected = {f"#{x}" for x in names} | {f"https://arxiv.org/abs/{x}" for x in papers}
    file = os.path.relpath(oracles.__file__, pages)
    cases = [case for case in oracles.LOSSES.values() if script in case.scripts.split()]
    expected |= {f"{file}#L{case.oracle.__code__.co_firstlineno}" for case in cases}
    assert links == expected and len(set(names)) == len(names)
