"""Patterns: parsing, rendering, sharing the room, token ids."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline import template
from pipeline.errors import InputError
from pipeline.template import Column, Encoder, Literally, Mask, Template, fair_shares
from tests.conftest import BAD, GOOD, POSITIONS, VOCABULARY, sentence

names = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "mask"
)
literals = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)


@st.composite
def templates(draw: st.DrawFn) -> list[Literally | Column | Mask]:
    """Parts with at least one column, at most one mask and no two literals side by side."""
    parts: list[Literally | Column | Mask] = [Column(name) for name in draw(st.lists(names, min_size=1, max_size=4))]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), Mask())
    mixed: list[Literally | Column | Mask] = []
    for part in parts:
        if draw(st.booleans()):
            mixed.append(Literally(draw(literals)))
        mixed.append(part)
    return mixed


def written(parts: list[Literally | Column | Mask]) -> str:
    """The source of a template."""

    def one(part: Literally | Column | Mask) -> str:
        if isinstance(part, Literally):
            return part.text.replace("{", "{{").replace("}", "}}")
        return "{" + (part.name if isinstance(part, Column) else "mask") + "}"

    return "".join(map(one, parts))


@given(templates())
def test_parsing_what_was_written_gives_the_same_parts(parts: list[Literally | Column | Mask]) -> None:
    template = Template.parse(written(parts))
    assert list(template.parts) == parts
    assert template.has_mask == (Mask() in parts)
    assert set(template.columns) == {part.name for part in parts if isinstance(part, Column)}


@given(templates(), st.data())
def test_rendering_puts_each_text_in_its_place(parts: list[Literally | Column | Mask], data: st.DataObject) -> None:
    template = Template.parse(written(parts))
    row = {name: data.draw(st.text(max_size=10)) for name in template.columns}
    expected = "".join(
        part.text if isinstance(part, Literally) else row[part.name] if isinstance(part, Column) else "<?>"
        for part in parts
    )
    assert template.render(row, mask="<?>") == expected


@given(st.text(st.sampled_from("{}ma sk"), max_size=14))
def test_any_text_parses_or_is_refused_with_a_fix(source: str) -> None:
    refused = None
    try:
        template = Template.parse(source)
    except InputError as error:
        refused = error
    if refused is None:
        assert template.columns
        assert written(list(template.parts)) == source
    else:
        assert repr(source) in refused.problem
        assert refused.fix


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{text} {mask} {mask}", "more than once"),
        ("It was {mask}.", "names no column"),
        ("{text", "opens no placeholder"),
        ("{} {mask}", "opens no placeholder"),
        ("{text} } {mask}", "closes nothing"),
        ("{te{xt} {mask}", "opens no placeholder"),
    ],
)
def test_a_malformed_pattern_is_refused_with_its_reason(source: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Template.parse(source)


def test_an_error_names_the_character_at_which_it_stands() -> None:
    with pytest.raises(InputError, match="at character 6"):
        Template.parse("{a}, }")


def test_a_template_without_a_mask_is_no_pattern() -> None:
    with pytest.raises(InputError, match=r"has no \{mask\}"):
        Template.parse("{text}").require_mask()


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(-5, 120))
def test_fair_shares_use_all_the_room_and_favour_nobody(lengths: list[int], room: int) -> None:
    shares = fair_shares(lengths, room)
    assert sum(shares) == min(max(room, 0), sum(lengths))
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))
    for i, (share, length) in enumerate(zip(shares, lengths, strict=True)):
        if share < length:  # whoever wants more has as much as anybody, but for an odd token that came earlier
            assert max(shares) <= share + 1
            assert all(other <= share for other in shares[i + 1 :])


# ---- token ids -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(tiny_model), POSITIONS)


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Any:
    """The tokenizer as anybody else would use it."""
    return AutoTokenizer.from_pretrained(tiny_model)


PATTERNS = ["{text} It was {mask}.", "{mask}: {text}", "The {text} was {mask} and {other}", "{text} {other} {mask}"]


def rows_of(count: int, seed: int = 0) -> dict[str, list[str]]:
    draw = random.Random(seed)
    return {
        "text": [sentence(draw, GOOD) for _ in range(count)],
        "other": [sentence(draw, BAD) for _ in range(count)],
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_are_those_of_the_rendered_text(pattern: str, encoder: Encoder, plain: Any) -> None:
    template, columns = Template.parse(pattern), rows_of(20)
    encoded = encoder.encode(template, columns)
    for i, ids in enumerate(encoded.tokens):
        whole = template.render({name: texts[i] for name, texts in columns.items()}, mask="[MASK]")
        assert ids.tolist() == plain(whole)["input_ids"]
    assert not encoded.shortened.any()


@pytest.mark.parametrize("truncation", ["head", "tail"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_encoded_in_pieces_are_those_encoded_at_once(
    pattern: str, truncation: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(_cached_tokenizer(tiny_model), 24, truncation)
    columns = {
        name: [" ".join(VOCABULARY[i * 13 + step : i * 13 + step + i * step % 30]) for i in range(8)]
        for name, step in (("text", 7), ("other", 11))
    }
    whole = encoder.encode(Template.parse(pattern), columns, masks=2)
    assert 0 < whole.shortened.sum() < 8
    monkeypatch.setattr(template, "_ROWS_AT_ONCE", 3)
    pieces = encoder.encode(Template.parse(pattern), columns, masks=2)
    assert pieces.tokens.values.tolist() == whole.tokens.values.tolist()
    assert pieces.own.tolist() == whole.own.tolist()
    assert pieces.mask_at.tolist() == whole.mask_at.tolist()


@given(texts=st.lists(st.text(max_size=200), min_size=1, max_size=4), pattern=st.sampled_from(PATTERNS), data=st.data())
@pytest.mark.parametrize("truncation", ["head", "tail"])
def test_every_text_fits_and_leaves_the_pattern_whole(
    tiny_model: Path, truncation: Any, texts: list[str], pattern: str, data: st.DataObject
) -> None:
    masks, length = data.draw(st.integers(1, 3)), data.draw(st.integers(24, POSITIONS))
    tokenizer = _cached_tokenizer(tiny_model)
    encoder = Encoder(tokenizer, length, truncation)
    template = Template.parse(pattern)
    encoded = encoder.encode(template, {"text": texts, "other": texts[::-1]}, masks=masks)
    bare = encoder.encode(template, {"text": ["a"], "other": ["a"]}, masks=masks)
    pattern_tokens = bare.tokens[0][~bare.own].tolist()
    assert len(pattern_tokens) == encoder.fixed_length(template, masks)
    own_of_rows = np.split(encoded.own, encoded.tokens.offsets[1:-1])
    for ids, at, own in zip(encoded.tokens, encoded.mask_at, own_of_rows, strict=True):
        assert len(ids) == len(own) <= length
        assert np.flatnonzero(ids == tokenizer.mask_token_id).tolist() == at.tolist()
        assert ids[~own].tolist() == pattern_tokens


_TOKENIZERS: dict[Path, Any] = {}


def _cached_tokenizer(path: Path) -> Any:
    if path not in _TOKENIZERS:
        _TOKENIZERS[path] = AutoTokenizer.from_pretrained(path)
    return _TOKENIZERS[path]


def test_head_keeps_the_beginning_and_tail_the_end_of_a_long_text(tiny_model: Path) -> None:
    words = (VOCABULARY * 2)[:100]
    template = Template.parse("{text} It was {mask}.")
    for truncation, kept in (("head", words[:10]), ("tail", words[-10:])):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        encoder = Encoder(tokenizer, 16, truncation)  # type: ignore[arg-type]
        assert encoder.fixed_length(template) == 6  # [CLS] it was [MASK] . [SEP]
        encoded = encoder.encode(template, {"text": [" ".join(words)]})
        own = encoded.tokens[0][encoded.own]
        assert tokenizer.convert_ids_to_tokens(own.tolist()) == kept
        assert encoded.shortened.tolist() == [True]


def test_a_text_that_just_fits_is_whole_and_one_more_token_is_cut(tiny_model: Path) -> None:
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 16)
    template = Template.parse("{text} It was {mask}.")  # six tokens of its own
    texts = [" ".join(VOCABULARY[:count]) for count in (9, 10, 11)]
    encoded = encoder.encode(template, {"text": texts})
    assert encoded.shortened.tolist() == [False, False, True]
    assert [len(ids) for ids in encoded.tokens] == [15, 16, 16]


def test_a_short_column_leaves_its_room_to_the_long_one(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = Encoder(tokenizer, 20).encode(
        Template.parse("{text} {mask} {other}"), {"text": ["good food"], "other": [" ".join(VOCABULARY[:60])]}
    )
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens[0].tolist())
    assert tokens == ["[CLS]", "good", "food", "[MASK]", *VOCABULARY[:15], "[SEP]"]


def test_special_tokens_in_a_text_are_text(encoder: Encoder, plain: Any) -> None:
    encoded = encoder.encode(Template.parse("{text} It was {mask}."), {"text": ["bad [MASK] [SEP] [CLS] [PAD] food"]})
    ids = encoded.tokens[0].tolist()
    for special in ("[MASK]", "[SEP]", "[CLS]"):
        assert ids.count(plain.convert_tokens_to_ids(special)) == 1
    assert ids.count(plain.pad_token_id) == 0
    assert "[" in plain.convert_ids_to_tokens(ids)


def test_an_empty_text_leaves_the_pattern_alone(encoder: Encoder, plain: Any) -> None:
    encoded = encoder.encode(Template.parse("{text} It was {mask}."), {"text": [""]})
    assert plain.convert_ids_to_tokens(encoded.tokens[0].tolist()) == ["[CLS]", "it", "was", "[MASK]", ".", "[SEP]"]


def test_no_rows_encode_to_nothing(encoder: Encoder) -> None:
    encoded = encoder.encode(Template.parse("{text} {mask}"), {"text": []}, masks=2)
    assert len(encoded) == 0
    assert encoded.mask_at.shape == (0, 2)


def test_a_template_without_a_mask_has_no_mask_position(encoder: Encoder) -> None:
    assert encoder.encode(Template.parse("{text}"), {"text": ["good", "bad"]}).mask_at.shape == (2, 0)


def test_a_pattern_that_fills_the_model_is_refused(encoder: Encoder) -> None:
    pattern = "good " * 70 + "{text} {mask}"
    with pytest.raises(InputError, match="leaves no room for the text"):
        encoder.encode(Template.parse(pattern), {"text": ["food"]})


def test_patterns_share_their_columns_tokens_without_changing_them(encoder: Encoder) -> None:
    columns = rows_of(5)
    cache: dict[Any, Any] = {}
    shared = [encoder.encode(Template.parse(pattern), columns, cache=cache) for pattern in PATTERNS]
    assert {slot.column for slot in cache} == {"text", "other"}
    assert len(cache) <= 4  # a column with and without a space before it, whatever the number of patterns
    for pattern, encoded in zip(PATTERNS, shared, strict=True):
        alone = encoder.encode(Template.parse(pattern), columns)
        assert [ids.tolist() for ids in encoded.tokens] == [ids.tolist() for ids in alone.tokens]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_byte_level_tokenizers_see_the_spaces_that_a_reader_sees(pattern: str, byte_level: Any) -> None:
    template, columns = Template.parse(pattern), rows_of(10)
    whole = [template.render({name: texts[i] for name, texts in columns.items()}, mask="<mask>") for i in range(10)]
    expected = [byte_level(text)["input_ids"] for text in whole]
    encoded = Encoder(byte_level, 512).encode(template, columns)
    assert [ids.tolist() for ids in encoded.tokens] == expected
