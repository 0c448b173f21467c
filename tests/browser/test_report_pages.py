"""Reports in a real browser: nothing is said or fetched, and they can be read on a phone, in the dark and on
paper."""

import base64
from pathlib import Path

import pytest

from tests.browser.chromium import Browser, Tab, find_chromium, running

KINDS = ("capacity", "experiment", "replay", "simulation")
PHONE, DESKTOP = (375, 800), (1280, 900)
PAPER_WIDTH, PAPER_HEIGHT = 688, 1000
"""A4 without the margins, in CSS pixels."""

# WCAG 2: relative luminance, contrast. Only what has text of its own is looked at.
_COLOURS = """
const shades = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => {
  const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const behind = one => {
  for (; one; one = one.parentElement) {
    const found = shades(getComputedStyle(one).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const said = () => [...document.body.querySelectorAll('*')].filter(
  one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
"""
_LEAST_CONTRAST = f"""(() => {{ {_COLOURS}
  return Math.min(...said().map(one => {{
    const [a, b] = [light(shades(getComputedStyle(one).color)), light(behind(one))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }}));
}})()"""
_BACKGROUND = f"(() => {{ {_COLOURS} return light(behind(document.body)); }})()"
_PICTURES = """[...document.images].map(one => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d');
  pen.drawImage(one, 0, 0, 1, 1, 0, 0, 1, 1);
  return [one.naturalWidth, Math.max(...pen.getImageData(0, 0, 1, 1).data.slice(0, 3))];
})"""
_HIDDEN = """[...document.querySelectorAll('h1,h2,h3,p,td,th,img,figcaption,pre,dt,dd')].filter(one => {
  const style = getComputedStyle(one);
  return one.getClientRects().length === 0 || style.visibility !== 'visible' || style.opacity === '0';
}).map(one => one.tagName + ' ' + one.textContent.slice(0, 40))"""
_CUT = """[...document.querySelectorAll('.scroll')].filter(
  one => getComputedStyle(one).overflowX !== 'visible' || one.scrollWidth > one.clientWidth + 1
).map(one => one.textContent.slice(0, 40))"""
_WIDTH = "document.documentElement.scrollWidth"


def pictures(tab: Tab) -> list[list[int]]:
    """The width of each picture, and how bright its corner is; 0 is what did not load."""
    found: list[list[int]] = tab.run(_PICTURES)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_says_nothing_and_fetches_nothing(
    browser: Browser, reports: dict[str, Path], kind: str
) -> None:
    with browser.tab() as tab:
        tab.open(reports[kind])
        for size in (PHONE, DESKTOP):
            for scheme in ("light", "dark"):
                tab.size(*size, is_phone=size is PHONE)
                tab.media("screen", scheme)
        assert tab.run("document.querySelectorAll('script').length") == 0
        assert tab.problems.all() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_scrolls_tables_but_never_the_page(
    browser: Browser, reports: dict[str, Path], kind: str
) -> None:
    with browser.tab() as tab:
        tab.size(*PHONE, is_phone=True)
        tab.open(reports[kind])
        assert tab.run("innerWidth") == PHONE[0]
        assert tab.run(_WIDTH) <= PHONE[0]
        # Were nothing wide on it, this would not tell.
        assert tab.run("[...document.querySelectorAll('.scroll')].some(one => one.scrollWidth > innerWidth)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_can_be_read_in_the_light_and_in_the_dark(
    browser: Browser, reports: dict[str, Path], kind: str, scheme: str
) -> None:
    with browser.tab() as tab:
        tab.open(reports[kind])
        tab.media("screen", scheme)
        is_dark = scheme == "dark"
        background = tab.run(_BACKGROUND)
        assert background < 0.05 if is_dark else background > 0.9
        assert tab.run(_LEAST_CONTRAST) >= 4.5
        shown = pictures(tab)
        assert shown
        assert all(width > 0 and (corner < 64 if is_dark else corner > 192) for width, corner in shown)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_carries_everything_in_the_light(
    browser: Browser, reports: dict[str, Path], kind: str, scheme: str
) -> None:
    with browser.tab() as tab:
        tab.size(PAPER_WIDTH, PAPER_HEIGHT)
        tab.open(reports[kind])
        tab.media("print", scheme)
        assert tab.run(_HIDDEN) == []
        assert tab.run(_CUT) == []
        assert tab.run(_WIDTH) <= PAPER_WIDTH
        assert tab.run(_BACKGROUND) > 0.9
        assert tab.run(_LEAST_CONTRAST) >= 4.5
        assert all(width > 0 and corner > 192 for width, corner in pictures(tab))
        printed = base64.b64decode(tab.call("Page.printToPDF", preferCSSPageSize=True)["data"])
        assert printed.startswith(b"%PDF-")
        assert tab.problems.all() == []


def test_the_links_of_the_contents_lead_somewhere(browser: Browser, reports: dict[str, Path]) -> None:
    with browser.tab() as tab:
        tab.open(reports["experiment"])
        links = tab.run("[...document.querySelectorAll('a')].map(one => one.getAttribute('href'))")
        assert len(links) >= 5
        assert all(tab.run(f"document.querySelectorAll({link!r}).length") == 1 for link in links)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        # Port 9 of this machine: nobody is asked, whatever comes of it.
        ('<img src="http://127.0.0.1:9/picture.png">', "request: http://127.0.0.1:9/picture.png"),
        ('<link rel="stylesheet" href="other.css">', "/other.css"),
        ("<script>console.error('wrong')</script>", "console error: wrong"),
        ("<script>console.warn('odd')</script>", "console warning: odd"),
        ("<script>throw new Error('thrown')</script>", "exception: Uncaught"),
    ],
)
def test_what_a_report_must_not_do_is_noticed(
    browser: Browser, tmp_path: Path, body: str, problem: str
) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>x</title>{body}", encoding="utf-8")
    with browser.tab() as tab:
        tab.open(page)
        assert [said for said in tab.problems.all() if problem in said]


@pytest.mark.parametrize(
    ("style", "script", "expected"),
    [
        (".wide { width: 900px }", _WIDTH, 900),
        (".wide { display: none }", _HIDDEN, ["P words"]),
        ("p { color: #888; background: #999 }", f"{_LEAST_CONTRAST} < 4.5", True),
        (".scroll { overflow: auto; width: 50px } .wide { width: 90px }", _CUT, ["words"]),
    ],
)
def test_what_a_report_must_not_look_like_is_noticed(
    browser: Browser, tmp_path: Path, style: str, script: str, expected: object
) -> None:
    page = tmp_path / "page.html"
    html = f'<style>body {{ margin: 0 }} {style}</style><div class="scroll"><p class="wide">words</p></div>'
    page.write_text(f"<!doctype html><title>x</title>{html}", encoding="utf-8")
    with browser.tab() as tab:
        tab.size(*PHONE)
        tab.open(page)
        assert tab.run(script) == expected


def test_neither_a_process_nor_a_profile_is_left(browser: Browser, tmp_path: Path) -> None:
    def processes(profile: Path) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = process.read_bytes()
            except OSError:
                continue
            if str(profile).encode() in line:
                found.append(str(process))
        return found

    program = find_chromium()
    assert program is not None
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>x</title>", encoding="utf-8")
    with pytest.raises(RuntimeError, match="midway"), running(program) as other:  # noqa: PT012
        with other.tab() as tab:
            tab.open(page)
            assert processes(other.profile)
        raise RuntimeError("midway")
    assert processes(other.profile) == []
    assert not other.profile.exists()
