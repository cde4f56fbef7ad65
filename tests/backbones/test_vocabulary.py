"""What tokens spell: the same text in two kinds of tokenizers is one key."""

import json

import pytest

from moa.backbones.vocabulary import ALPHABET, spellings, split
from tests.support.tiny import tiny_tokenizer

PIECES = {
    "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁red", -1.0], ["<0x0A>", -2.0], ["é", -3.0]]},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]},
    "added_tokens": [{"id": 7, "content": "<image>", "special": True}],
}


def test_tokens_of_two_kinds_of_tokenizers_are_compared_by_what_they_spell():
    bytewise = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    bytewise["model"]["vocab"] |= {"Ġred": 900, "Ċ": 901, "Ã©": 902}
    one, other = spellings(bytewise), spellings(PIECES)
    assert sorted(ALPHABET.values()) == list(range(256))
    assert other == {b"<unk>": 0, b" red": 1, b"\n": 2, "é".encode(): 3, b"<image>": 7}
    assert {text: one[text] for text in (b" red", b"\n", "é".encode())} == dict(
        zip([b" red", b"\n", "é".encode()], [900, 901, 902], strict=True)
    )
    assert one[b"<loc0003>"] == tiny_tokenizer().convert_tokens_to_ids("<loc0003>")
    assert spellings({}) == {}


def test_a_text_is_split_into_the_longest_tokens():
    words = {b"a": 0, b"ab": 1, b"b": 2, b"abc": 3, b"\xc3": 4}
    assert split(b"abcabb\xc3", words) == [3, 1, 2, 4] and split(b"", words) == []
    with pytest.raises(ValueError, match="no token spells the byte b'd'"):
        split(b"abd", words)
