"""Every reference leads somewhere: sections that comments cite, links between Markdown files."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = ('.md', '.py', '.toml', '.yml')

# A file of docs/ or a document at the root, alone or as in (docs/reference.md, Losses). A section begins with a capital
# letter and ends with a bracket, a quote, other punctuation or the line. The line may be broken in front of it.
CITATION = re.compile(
    r'(?<![\w./-])(?P<file>docs/[\w/-]+\.md|(?:README|ARCHITECTURE|CONTRIBUTING)\.md)'
    r'(?:,\s+(?:# )?(?!\S+\.md)"?(?P<section>[A-Z][^"\'`().;:|\n]*))?'
)
ELSEWHERE = re.compile(r'\b(?:[Ss]pec|[Ii]tems?) \d')  # sections of texts that are not in the repository
LINK = re.compile(r'\]\(([^()\s]+)(?: "[^"]*")?\)|\b(?:href|src)="([^"]+)"')


def dead_references(root: Path, files: list[Path]) -> list[str]:
    """'file: what leads nowhere', of the citations and the relative links in these files below `root`."""
    dead = []
    for file in files:
        text, where = file.read_text(), file.relative_to(root)
        for found in CITATION.finditer(text):
            cited = root / found['file']
            if cited not in files:
                dead.append(f'{where}: there is no {found["file"]}')
            elif (section := found['section']) and section.strip() not in headings(cited):
                dead.append(f'{where}: {found["file"]} has no section {section.strip()}')
        dead += [f'{where}: {found[0]}... is not in this repository' for found in ELSEWHERE.finditer(text)]
        if file.suffix == '.md':
            dead += [f'{where}: link to {link}' for link in links(text) if not leads_somewhere(file, link)]
    return dead


def headings(file: Path) -> list[str]:
    return re.findall(r'^#+ (.+?)\s*$', without_code(file.read_text()), re.MULTILINE)


def anchors(file: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, no punctuation."""
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings(file)}


def links(text: str) -> list[str]:
    """Targets in a Markdown text, but for addresses on the web."""
    targets = [markdown or html for markdown, html in LINK.findall(re.sub(r'`[^`\n]*`', '', without_code(text)))]
    return [unquote(target) for target in targets if not re.match(r'[a-z]+:', target)]


def without_code(text: str) -> str:
    return re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)


def leads_somewhere(file: Path, link: str) -> bool:
    path, _, anchor = link.partition('#')
    target = file.parent / path if path else file
    return target.exists() and (not anchor or (target.suffix == '.md' and anchor in anchors(target)))


def tracked() -> list[Path]:
    """The files of the repository, new ones included that are not ignored."""
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    return [ROOT / name for name in listed if name.endswith(TEXTS) and (ROOT / name).is_file()]


def test_every_reference_leads_somewhere():
    files = tracked()
    assert ROOT / 'docs/reference.md' in files
    assert dead_references(ROOT, files) == []


REFERENCE = 'docs/' + 'guide.md'  # in two parts, since this file is read by the test above
PAGE = """# Guide

```bash
# no heading
```

## Losses
### Names of `layers`, all
"""


@pytest.mark.parametrize(
    ('text', 'dead'),
    [
        (f'# ({REFERENCE}, Losses)', ''),
        (f'# {REFERENCE}, Losses.', ''),
        (f'"""As in {REFERENCE},\n    # Losses (and more)."""', ''),
        (f'see {REFERENCE}, which explains it', ''),
        (f'{REFERENCE}, {REFERENCE}', ''),
        (f'# ({REFERENCE}, Loss)', f'{REFERENCE} has no section Loss'),
        (f'# ({REFERENCE}, Losses and more)', f'{REFERENCE} has no section Losses and more'),
        (f'# ({REFERENCE},\n# Loss)', f'{REFERENCE} has no section Loss'),
        (f'# ({REFERENCE}, No heading)', f'{REFERENCE} has no section No heading'),
        ('# docs/' + 'nothing.md', 'there is no docs/' + 'nothing.md'),
        ('# see ARCHITECTURE.md', 'there is no ARCHITECTURE.md'),
        ('# as in {} 5'.format('spec'), '{} 5... is not in this repository'.format('spec')),
        ('# ({} 5 and 6)'.format('Items'), '{} 5... is not in this repository'.format('Items')),
    ],
)
def test_citations(text, dead, tmp_path):
    page, module = tmp_path / REFERENCE, tmp_path / 'module.py'
    page.parent.mkdir()
    page.write_text(PAGE)
    module.write_text(text)
    assert dead_references(tmp_path, [page, module]) == ([f'module.py: {dead}'] if dead else [])


@pytest.mark.parametrize(
    ('link', 'leads'),
    [
        ('guide.md', True),
        ('guide.md#losses', True),
        ('../docs/guide.md#names-of-layers-all', True),
        ('#guide', True),
        ('..', True),
        ('guide.md#loss', False),
        ('guide.md#no-heading', False),
        ('#loss', False),
        ('other.md', False),
        ('guide%20book.md', False),
        ('https://example.org/other.md', True),
    ],
)
def test_links(link, leads, tmp_path):
    page = tmp_path / REFERENCE
    page.parent.mkdir()
    for text in (f'[text]({link})', f'[![`image`]({link} "title")]({link})', f'<img src="{link}">'):
        page.write_text(f'{PAGE}{text}\n')
        assert (dead_references(tmp_path, [page]) == []) is leads
    page.write_text(f'{PAGE}`[text]({link})`\n\n```\n[text]({link})\n```\n')  # shown, not linked
    assert dead_references(tmp_path, [page]) == []


# ARCHITECTURE.md.


def test_the_tree_in_architecture_is_the_package():
    package = ROOT / 'effdet_jax'
    tree = section((ROOT / 'ARCHITECTURE.md').read_text(), 'Layout').partition('\nconfigs/')[0]
    modules = {path.name for path in package.rglob('*.py') if 'configs' not in path.parts}
    folders = {path.parent.name for path in package.rglob('*.py') if 'configs' not in path.parts}
    described = set(re.findall(r'(?<![\w/])\w+\.py', tree))
    assert described - {'__init__.py'} == modules - {'__init__.py'}
    assert set(re.findall(r'(\w+)/(?: |\n)', tree)) - {'templates'} == folders


def test_the_files_that_architecture_names_exist():
    text = section((ROOT / 'ARCHITECTURE.md').read_text(), 'Decisions')
    named = re.findall(r'`([\w/]+\.(?:py|md|toml))`', text)
    assert len(named) > 20
    assert [name for name in named if not any((ROOT / start / name).exists() for start in ('', 'effdet_jax'))] == []


def section(text, heading):
    """What stands below `## heading`."""
    return text.partition(f'\n## {heading}\n')[2].partition('\n## ')[0]
