"""Pages of the site that are made from the code and from the repository's root."""

import re

from launch.keys import all_keys, settings_of
from tests.support.documents import DOCS
from tools.docs_pages import FILES, FROM_ROOT, ROOT, commands_page, linked, settings_page


def test_the_settings_page_has_every_setting_with_its_meaning() -> None:
    page = settings_page()
    for setting in settings_of():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{setting.key}` |")]
        assert setting.meaning.split(";")[0].split("|")[0].strip() in row.replace("&#124;", "|")
        assert row.count("|") - row.count("`|") == 5 or row.count(" | ") == 3, "four cells"
    assert len(all_keys()) > 100


def test_the_commands_page_has_every_command_with_its_options() -> None:
    page = commands_page()
    for words in ("nd train", "nd reconstruct", "nd config keys"):
        assert f"`{words}`" in page
    assert "--all-targets" in page


def test_links_of_the_readme_lead_to_files_and_on_the_site_to_pages() -> None:
    text = (ROOT / "README.md").read_text()
    links = set(re.findall(r"\]\(([\w./-]+)", text)) - {"https"}
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
    pages = {*FILES, *FROM_ROOT.values(), *(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.*"))}
    assert set(re.findall(r"\]\(([\w./-]+)", linked(text))) - {"https"} <= pages
