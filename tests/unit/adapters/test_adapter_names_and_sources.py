"""Names are safe everywhere; sources are told apart by fixed rules and cannot leave what is allowed."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapters import HubSource, LocalSource, UrlSource, parse_name, parse_source, resolve_source
from loraserve.errors import AdapterRejectedError
from tests.support.adapter_maker import one_line


@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", fullmatch=True))
def test_plain_names_are_accepted(name: str) -> None:
    assert parse_name(name) == name


@given(name=st.text(max_size=140))
def test_an_accepted_name_is_safe_as_a_file_name(name: str) -> None:
    try:
        parse_name(name)
    except AdapterRejectedError as error:
        one_line(error)
    else:
        assert os.path.basename(name) == name
        assert os.path.normpath(f"/store/{name}") == f"/store/{name}"
        assert name.isascii()
        assert "@" not in name
        assert not name.startswith((".", "-"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "../a", "a..b", "a b", "a@1", "-a", "ä", "a\n", "a" * 129, "a\x00"]
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(AdapterRejectedError, match="adapter name"):
        parse_name(name)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/data/a", LocalSource(path=Path("/data/a"))),
        ("file:///data/a%20b", LocalSource(path=Path("/data/a b"))),
        ("FILE://localhost/data/a", LocalSource(path=Path("/data/a"))),
        ("~/a", LocalSource(path=Path("~/a").expanduser())),
        ("acme/sql-lora", HubSource(repository="acme/sql-lora")),
        ("acme/sql-lora@v1.2", HubSource(repository="acme/sql-lora", revision="v1.2")),
        ("s3://bucket/loras/a/", UrlSource(url="s3://bucket/loras/a")),
        ("s3://bucket/loras", UrlSource(url="s3://bucket/loras")),
        ("https://h/x/a", UrlSource(url="https://h/x/a")),
    ],
)
def test_sources_are_told_apart(text: str, source: object) -> None:
    assert parse_source(text, allow_urls=["s3://bucket/loras/", "https://h"]) == source


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a path"),
        ("/a\x00b", "expected a path"),
        ("./a", "absolute path"),
        ("../a", "absolute path"),
        ("/a/../b", "without '..'"),
        ("file:///a/%2e%2e/b", "without '..'"),
        ("file://host/a", "file:///absolute/path"),
        ("file:///a?x", "file:///absolute/path"),
        ("file://[/a", "not a valid URL"),
        ("sql-lora", "Hugging Face id"),
        ("a/b/c", "Hugging Face id"),
        ("a/..", "Hugging Face id"),
        ("ä/b", "Hugging Face id"),
        ("s3://other/a", "allow_urls"),
        ("s3://bucket/lorasX/a", "allow_urls"),
        ("https://h.evil/a", "allow_urls"),
        ("https://h@evil/a", "allow_urls"),
        ("s3://bucket/loras/../secret", "'..' segments"),
        ("s3://bucket/loras/%2e%2e/secret", "'..' segments"),
        ("s3://bucket/loras/%252e%252e/secret", "'..' segments"),
        ("s3://bucket/loras/a::file:///etc", "'::'"),
        ("https://h/a?token=1", "'?'"),
        ("https://h/a#b", "'#'"),
        ("https://h/..\\a", "'\\'"),
    ],
)
def test_unsafe_or_unknown_sources_are_refused(text: str, words: str) -> None:
    with pytest.raises(AdapterRejectedError, match=re.escape(words)):
        parse_source(text, allow_urls=["s3://bucket/loras/", "https://h"])


def test_no_url_is_allowed_by_default() -> None:
    with pytest.raises(AdapterRejectedError, match="allowed: none"):
        parse_source("https://h/a")


@given(text=st.text(max_size=60), prefix=st.sampled_from(["", "file://", "s3://b/", "/", "~", "./"]))
def test_any_text_is_parsed_or_refused(text: str, prefix: str) -> None:
    try:
        source = parse_source(prefix + text, allow_urls=["s3://b"])
    except AdapterRejectedError as error:
        one_line(error)
    else:
        if isinstance(source, LocalSource):
            assert source.path.is_absolute()
            assert ".." not in source.path.parts
        if isinstance(source, UrlSource):
            assert f"{source.url}/".startswith("s3://b/")


def test_relative_paths_resolve_where_the_person_stands(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_source("./x", tmp_path) == str(tmp_path / "x")
    assert resolve_source("../x", tmp_path) == str(tmp_path.parent / "x")
    assert resolve_source(".", tmp_path) == str(tmp_path)
    assert resolve_source("org/name", tmp_path) == str(tmp_path / "org" / "name")
    assert resolve_source("org/other", tmp_path) == "org/other"
    assert resolve_source("s3://b/a", tmp_path) == "s3://b/a"
    assert resolve_source("/abs", tmp_path) == "/abs"
    assert resolve_source("~", tmp_path) == str(Path.home())
