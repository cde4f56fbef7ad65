"""What the tokens of a tokenizer spell, in bytes, so that two vocabularies can be compared.

byte-level BPE   "Ġred" spells " red"
sentencepiece    "▁red" spells " red", "<0x0A>" a new line
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa.files.peft_config import read_json_object

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as themselves
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
ALPHABET = {chr(byte): byte for byte in PLAIN} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}


def spellings(record: Mapping[str, Any]) -> dict[bytes, int]:
    """What each token of a tokenizer.json spells -> its id."""
    listed = record.get("model", {}).get("vocab", {})
    pairs = listed if isinstance(listed, Mapping) else {row[0]: place for place, row in enumerate(listed)}
    bytewise = '"ByteLevel"' in json.dumps([record.get("decoder"), record.get("pre_tokenizer")])
    found = {spelled(token, bytewise): number for token, number in pairs.items()}
    return found | {row["content"].encode(): row["id"] for row in record.get("added_tokens", [])}


def spelled(token: str, bytewise: bool) -> bytes:
    if bytewise and all(letter in ALPHABET for letter in token):
        return bytes(ALPHABET[letter] for letter in token)
    byte = None if bytewise else BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def read_spellings(folder: Path) -> dict[bytes, int]:
    """Of a folder's tokenizer.json; empty without one."""
    file = folder / "tokenizer.json"
    return spellings(read_json_object(file)) if file.is_file() else {}


def split(text: bytes, vocabulary: Mapping[bytes, int]) -> list[int]:
    """Tokens that spell a text, at each place the longest; ValueError for bytes that none spells."""
    found, start = list[int](), 0
    while start < len(text):
        ends = (end for end in range(len(text), start, -1) if text[start:end] in vocabulary)
        end = next(ends, None)
        if end is None:
            raise ValueError(f"tokenizer: no token spells the byte {text[start : start + 1]!r}")
        found.append(vocabulary[text[start:end]])
        start = end
    return found
