"""Verbalizers: label words to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.errors import InputError
from pipeline.verbalizer import Verbalizer
from tests.conftest import BAD, GOOD, VOCABULARY

_TOKENIZERS: dict[Path, Any] = {}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return _tokenizer(tiny_model)


def _tokenizer(path: Path) -> Any:
    if path not in _TOKENIZERS:
        _TOKENIZERS[path] = AutoTokenizer.from_pretrained(path)
    return _TOKENIZERS[path]


@given(chosen=st.lists(st.sampled_from(VOCABULARY), min_size=4, max_size=12, unique=True), cut=st.integers(1, 3))
def test_words_keep_their_order_their_label_and_their_token(tiny_model: Path, chosen: list[str], cut: int) -> None:
    tokenizer = _tokenizer(tiny_model)
    verbalizer = Verbalizer.resolve({"first": chosen[:cut], "second": chosen[cut:]}, tokenizer)
    assert [word.text for word in verbalizer.words] == chosen
    assert [word.label for word in verbalizer.words] == [0] * cut + [1] * (len(chosen) - cut)
    assert [word.ids for word in verbalizer.words] == [(tokenizer.convert_tokens_to_ids(word),) for word in chosen]
    assert verbalizer.labels == 2
    assert verbalizer.widths == [1]


def test_a_word_of_several_tokens_gets_all_of_them(tokenizer: Any) -> None:
    verbalizer = Verbalizer.resolve({"good": ["goodly", "great"], "bad": ["very bad"]}, tokenizer)
    assert [tokenizer.convert_ids_to_tokens(list(word.ids)) for word in verbalizer.words] == [
        ["good", "##l", "##y"],
        ["great"],
        ["very", "bad"],
    ]
    assert verbalizer.widths == [1, 2, 3]


def test_spaces_around_a_word_do_not_matter(tokenizer: Any) -> None:
    given, bare = ({"good": [text], "bad": ["bad"]} for text in ("  good ", "good"))
    assert Verbalizer.resolve(given, tokenizer).words[0].ids == Verbalizer.resolve(bare, tokenizer).words[0].ids


def test_a_word_is_read_as_behind_a_space_where_the_tokenizer_marks_that(byte_level: Any) -> None:
    verbalizer = Verbalizer.resolve({"good": ["good"], "bad": ["terrible"]}, byte_level)
    tokens = [byte_level.convert_ids_to_tokens(list(word.ids)) for word in verbalizer.words]
    assert tokens == [
        ["\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}good"],
        ["\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}terrible"],
    ]
    in_a_sentence = byte_level("It was good, not terrible.")["input_ids"]
    assert all(word.ids[0] in in_a_sentence for word in verbalizer.words)


def test_a_special_token_as_a_word_is_read_as_text(tokenizer: Any) -> None:
    ids = Verbalizer.resolve({"a": ["[MASK]"], "b": ["bad"]}, tokenizer).words[0].ids
    assert tokenizer.mask_token_id not in ids


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"good": ["good"], "bad": [" "]}, "is empty"),
        ({"good": ["good"], "bad": ["\N{SNOWMAN}"]}, "does not know the label word"),
        ({"good": GOOD[:3], "bad": [*BAD[:2], GOOD[1]]}, "is shared by 'bad' and 'good'"),
        ({"good": ["good"], "bad": ["Good"]}, "the model reads both alike"),
        ({"good": ["great", "Great"], "bad": ["bad"]}, "stands there twice"),
    ],
)
def test_a_word_that_cannot_serve_is_refused_with_its_label(
    words: dict[str, list[str]], told: str, tokenizer: Any
) -> None:
    with pytest.raises(InputError, match=told) as caught:
        Verbalizer.resolve(words, tokenizer, where="annotators, p1")
    assert caught.value.where is not None
    assert caught.value.where.startswith("annotators, p1, label ")
    assert caught.value.fix
