"""Prompts become ids and ids become text, never with a broken character in between."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.engines.tokenizer import BYTE_BOS, BYTE_EOS, PromptRenderer
from loraserve.errors import BadInputError, ConfigError
from loraserve.request import ChatTurn

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
BYTES = PromptRenderer.load("")
TEMPLATE = (
    "{% for message in messages %}\n<{{ message['role'] }}>{{ message['content'] | trim }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_model(folder: Path, template: object = TEMPLATE) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PromptRenderer:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return PromptRenderer.load(str(folder))


def renderers(model: PromptRenderer) -> dict[str, PromptRenderer]:
    return {"bytes": BYTES, "model": model}


@pytest.mark.parametrize("kind", ["bytes", "model"])
@given(text=TEXT)
def test_text_survives_encoding_and_decoding_token_by_token(
    kind: str, model: PromptRenderer, text: str
) -> None:
    renderer = renderers(model)[kind]
    token_ids = renderer.encode(text)[1:]
    assert renderer.decode(token_ids) == text
    decoder = renderer.detokeniser(renderer.encode("before é"))
    parts = [decoder.push((token_id,)) for token_id in token_ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + decoder.flush() == text


@pytest.mark.parametrize("kind", ["bytes", "model"])
def test_a_character_comes_when_its_last_byte_does(kind: str, model: PromptRenderer) -> None:
    renderer = renderers(model)[kind]
    decoder = renderer.detokeniser(())
    parts = [decoder.push((token_id,)) for token_id in renderer.encode("a€🙂")[1:]]
    assert parts == ["a", "", "", "€", "", "", "", "🙂"]


def test_a_character_that_the_prompt_began_is_given_out_whole(model: PromptRenderer) -> None:
    token_ids = model.encode("a€")[1:]
    decoder = model.detokeniser(token_ids[:-1])
    assert decoder.push(token_ids[-1:]) + decoder.push(model.encode("b")[1:]) == "€b"


@pytest.mark.parametrize("kind", ["bytes", "model"])
def test_an_unfinished_character_is_replaced_at_the_end_only(kind: str, model: PromptRenderer) -> None:
    renderer = renderers(model)[kind]
    decoder = renderer.detokeniser(())
    token_ids = renderer.encode("a€")[1:-1]
    assert "".join(decoder.push((token_id,)) for token_id in token_ids) == "a"
    assert set(decoder.flush()) == {"\ufffd"}


@pytest.mark.parametrize("kind", ["bytes", "model"])
def test_bytes_that_never_form_a_character_are_not_held_for_ever(kind: str, model: PromptRenderer) -> None:
    renderer = renderers(model)[kind]
    decoder = renderer.detokeniser(())
    continuation = renderer.encode("€")[-1]
    assert "\ufffd" in "".join(decoder.push((continuation,)) for _ in range(100))


def test_a_plain_prompt_begins_with_the_special_token_and_a_chat_does_not(model: PromptRenderer) -> None:
    bos = model.encode("")[0]
    assert model.prompt_ids("hi")[0] == bos
    assert BYTES.prompt_ids("hi") == (BYTE_BOS, *b"hi")
    turns = (ChatTurn(role="user", content=" hi "),)
    assert bos not in model.prompt_ids(turns)
    assert model.decode(model.prompt_ids(turns)) == model.render_chat(turns)


def test_a_chat_is_rendered_as_the_template_says(model: PromptRenderer) -> None:
    turns = [ChatTurn(role="system", content="be brief"), ChatTurn(role="user", content=" {{ 7 * 7 }} ")]
    assert model.render_chat(turns) == "<system>be brief\n<user>{{ 7 * 7 }}\n<assistant>"


def test_a_template_may_refuse_and_its_reason_is_told(tmp_path: Path) -> None:
    write_model(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadInputError, match="roles must alternate"):
        PromptRenderer.load(str(tmp_path)).render_chat([ChatTurn(role="user", content="x")])


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    write_model(tmp_path, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(BadInputError, match="unsafe"):
        PromptRenderer.load(str(tmp_path)).render_chat([ChatTurn(role="user", content="x")])


def test_a_named_default_template_is_taken_and_none_is_an_error_only_when_asked(tmp_path: Path) -> None:
    write_model(tmp_path, [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}])
    assert PromptRenderer.load(str(tmp_path)).render_chat([]) == "d"
    write_model(tmp_path, None)
    renderer = PromptRenderer.load(str(tmp_path))
    assert renderer.prompt_ids("text")
    with pytest.raises(BadInputError, match="no chat template"):
        renderer.prompt_ids((ChatTurn(role="user", content="x"),))


def test_the_ends_of_text_are_found_where_models_keep_them(tmp_path: Path, model: PromptRenderer) -> None:
    assert BYTES.eos_token_ids == {BYTE_EOS}
    assert model.eos_token_ids == {257}
    write_model(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}', encoding="utf-8")
    assert PromptRenderer.load(str(tmp_path)).eos_token_ids == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}', encoding="utf-8")
    assert PromptRenderer.load(str(tmp_path)).eos_token_ids == {1, 2}


def test_clean_ids_decode_each_alone(model: PromptRenderer) -> None:
    for renderer in (BYTES, model):
        clean = renderer.clean_ids()
        assert clean
        assert not renderer.eos_token_ids & set(clean)
        assert all(renderer.decode((one,)) and "\ufffd" not in renderer.decode((one,)) for one in clean)


@pytest.mark.parametrize("path", ["/nonexistent", "no-such-folder", "./no/such"])
def test_a_path_that_is_no_model_is_refused_by_name(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        PromptRenderer.load(path)


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        PromptRenderer.load(str(tmp_path))
    write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        PromptRenderer.load(str(tmp_path))
    write_model(tmp_path, "{% if %}")
    with pytest.raises(ConfigError, match="chat template"):
        PromptRenderer.load(str(tmp_path))
