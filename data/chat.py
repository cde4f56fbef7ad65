"""Chats -> token ids and where the answers are, by any processor of the family.

    prompt of generation | answer, end token | next question | answer, end token ...

The chat template is rendered a second time with a marker for each answer: what is around the markers is
around the answers. An answer is learned from the end of the prompt that generation sees, and one token that ends
generation follows it, always. `{% generation %}` in a template decides which answers are learned, and where
one begins if generation sees another prompt. Without a template (PaliGemma) the prompt is image and text.
"""

import re
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, takewhile, zip_longest
from typing import Any

from data.sample import PLACE

GENERATION_MARK = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
EDGE = "\ufdd0"  # no character: marks the ends of a mark in a rendered chat
MARKER = "answerQ7xK2vJ9wZ4"  # letters and digits: no template trims, splits or escapes it
CONTEXT = 32  # characters before a text, which may change its first token
WITHOUT_TEMPLATE = ("PaliGemmaProcessor",)  # whose bases were trained without roles
Chat = list[dict[str, Any]]


def check_parts(processor: Any) -> None:
    """ValueError for a processor without a part that every answer needs."""
    for name in ("eos_token", "pad_token"):
        if getattr(processor.tokenizer, name) is None:
            advice = "eos_token ends an answer; pad_token may be the same token"
            place = "name one of its tokens in tokenizer_config.json"
            raise ValueError(f"the base's tokenizer has no {name}: {place} ({advice})")
    if processor.chat_template is None and type(processor).__name__ not in WITHOUT_TEMPLATE:
        raise ValueError(
            "the base's processor has no chat template, so that questions and answers would have no "
            "roles: copy chat_template.jinja of the model that the base was made from into its folder"
        )


def special_tokens(processor: Any) -> set[str]:
    """Texts that are not read as text: the vocabulary's special tokens and the places of images."""
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    own = [value for name, value in vars(processor).items() if name.endswith("_token")]
    named = [*own, *getattr(tokenizer, "all_special_tokens", ())]
    found = [getattr(token, "content", token) for token in named]
    return {token.content for token in added if token.special} | {*filter(None, found)}


@dataclass(frozen=True)
class Dialogue:
    """What precedes each answer that is learned, the answer, and the token that ends it."""

    exchanges: list[tuple[str, str]]
    end: int


@dataclass
class Written:
    """A tokenizer that keeps the texts that it was last given."""

    tokenizer: Any
    texts: list[str] = field(default_factory=list)

    def __call__(self, text: list[str], **options: Any) -> Any:
        self.texts = [*text]
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@dataclass(frozen=True)
class ChatEncoder:
    """`stops` are ids that end generation besides the tokenizer's own end token."""

    processor: Any  # of transformers
    stops: Collection[int] = ()

    def encode(self, chats: list[Chat], images: Sequence[Sequence[Any]], *, prompts: bool) -> dict[str, Any]:
        """Ids and assistant masks as lists of unequal length, and images; `prompts`: up to the answer, no masks."""
        chats = [self._in_place(chat) for chat in chats]
        if prompts:
            openings = [[*takewhile(lambda m: m["role"] != "assistant", chat)] for chat in chats]
            return self._encode_prompts([*map(self._prompt, openings)], images)
        dialogues = [self.dialogue(chat) for chat in chats]
        if any(self._image_token in asked for d in dialogues for asked, _ in d.exchanges[1:]):
            encoded, dialogues = self._encode_dialogues(dialogues, images)
        else:
            encoded = self._encode_prompts([d.exchanges[0][0] for d in dialogues], images)
        replies = [self.replies(dialogue) for dialogue in dialogues]
        pairs = list(zip(encoded["input_ids"], replies, strict=True))
        encoded["assistant_masks"] = [[0] * len(p) + mask for p, (_, mask) in pairs]
        encoded["input_ids"] = [[*p, *ids] for p, (ids, _) in pairs]
        return encoded

    def _encode_prompts(self, texts: list[str], images: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The prompts' ids, exactly as generation will see them, and the images."""
        shown = list(images) if any(images) else None
        # padding: PaliGemma's processor cannot do without
        encoded = self.processor(text=texts, images=shown, padding=True, **self._once(texts))
        rows = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        ids = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
        return {**encoded, "input_ids": ids}

    def _encode_dialogues(
        self, dialogues: list[Dialogue], images: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, Any], list[Dialogue]]:
        """The same with images behind the first answer, whose tokens the processor writes into the texts between."""
        written = Written(self.processor.tokenizer)
        processor = copy(self.processor)
        processor.tokenizer = written
        texts = [EDGE.join(asked for asked, _ in dialogue.exchanges) for dialogue in dialogues]
        encoded = {**processor(text=texts, images=list(images), padding=True)}
        whole = []
        for text, dialogue in zip(written.texts, dialogues, strict=True):
            pairs = zip(text.split(EDGE), dialogue.exchanges, strict=True)
            whole.append(Dialogue([(asked, answer) for asked, (_, answer) in pairs], dialogue.end))
        openings = [dialogue.exchanges[0][0] for dialogue in whole]
        encoded["input_ids"] = self.processor.tokenizer(openings, **self._once(openings))["input_ids"]
        return encoded, whole

    def _once(self, texts: list[str]) -> dict[str, bool]:
        """Options of a tokenizer for texts that may have their begin token already."""
        begin = self.processor.tokenizer.bos_token
        begun = begin is not None and all(text.startswith(begin) for text in texts)
        return {"add_special_tokens": False} if begun else {}

    @property
    def _image_token(self) -> str:
        """What a template writes for an image, and the processor reads as one."""
        return getattr(self.processor, "image_token", EDGE)

    def _in_place(self, chat: Chat) -> Chat:
        """The chat; images among the text of a message are written into it where the template would move them ahead."""
        kinds = ["".join(part["type"][0] for part in message["content"]) for message in chat]
        if not any("ti" in kind for kind in kinds) or not self._moves_images:
            return chat
        return [with_tokens(m, self._image_token) if "ti" in k else m for m, k in zip(chat, kinds, strict=True)]

    @cached_property
    def _moves_images(self) -> bool:
        text = {"type": "text", "text": MARKER}
        written = self._render([{"role": "user", "content": [text, {"type": "image"}, text]}])[0]
        return self._image_token not in written.split(MARKER)[1]

    def replies(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        """Ids of everything behind the opening prompt, and 1 at answers and their ends."""
        end_text = self.processor.tokenizer.convert_ids_to_tokens(dialogue.end)
        ids: list[int] = []
        mask: list[int] = []
        behind = ""
        for number, (asked, answer) in enumerate(dialogue.exchanges):
            question = self._ids(behind, asked) if number else []
            said = [*self._ids(behind + asked, answer), dialogue.end]
            ids += question + said
            mask += [0] * len(question) + [1] * len(said)
            behind += asked + answer + end_text
        return ids, mask

    def _ids(self, before: str, text: str) -> list[int]:
        """The ids of a text behind another; alone, tokenizers of Llama's kind write a blank before every text."""
        tokenizer = self.processor.tokenizer
        if self.processor.chat_template is None:  # the processor puts a line break between the two
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        before = before[-CONTEXT:]
        encoded = tokenizer([before, before + text, text], add_special_tokens=False)
        known, whole, alone = encoded["input_ids"]
        return whole[len(known) :] if whole[: len(known)] == known else alone

    def dialogue(self, chat: Chat) -> Dialogue:
        """The answers of a chat and what is between them, as texts.

        Raises ValueError for a template that does not write an answer as it is, writes another prompt
        once there is an answer, or leaves nothing to learn from.
        """
        answers = [m["content"][0]["text"] for m in chat if m["role"] == "assistant"]
        hidden = [message("assistant", MARKER) if m["role"] == "assistant" else m for m in chat]
        around = self._render(hidden)[0].split(MARKER)
        whole, marks = self._render(chat)
        pairs = zip_longest(around, answers, fillvalue="")
        if len(around) != len(answers) + 1 or whole != "".join(map("".join, pairs)):
            raise ValueError("the base's chat template does not write the answer as it is")
        end, tail = self._end_of(around[-1])
        exchanges, done, stop = [], 0, 0
        for number, answer in enumerate(answers):
            start = stop + len(around[number])
            stop = start + len(answer)
            mark = marked_from(marks, start)
            if mark is None:
                continue  # as the template says
            place = [i for i, message in enumerate(chat) if message["role"] == "assistant"][number]
            prompt, gap = self._parted(whole[:start], whole[:done], chat[:place], mark)
            exchanges.append((prompt[done:], gap + answer))
            done = stop + len(tail) if around[number + 1].startswith(tail) else stop
        if not exchanges:
            raise ValueError("the base's chat template marks no answer, so there is none to learn")
        return Dialogue(exchanges, end)

    def _parted(self, before: str, done: str, history: Chat, mark: int) -> tuple[str, str]:
        """What is before an answer as the prompt that generation sees, and what is learned of it."""
        prompt = self._prompt(history)
        if prompt.startswith(done):
            if before.startswith(prompt) and not before[len(prompt) : mark].strip():
                return prompt, before[len(prompt) :]
            # OneVision writes "assistant \n" for "assistant\n"
            if before.split() == prompt.split():
                return prompt, ""
        if self._marked:
            return before[:mark], before[mark:]
        advice = "put {% generation %} around the assistant's text in it"
        problem = "the base's chat template rewrites the prompt once there is an answer"
        raise ValueError(f"{problem}: {advice}")

    def _prompt(self, chat: Chat) -> str:
        """What precedes an answer: all of the chat, and the start of the assistant's turn."""
        if self.processor.chat_template is None:
            return self._render(chat)[0]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def _render(self, chat: Chat) -> tuple[str, list[tuple[int, int]] | None]:
        """The chat as text, and where the template marks answers; None for one without marks."""
        if self.processor.chat_template is None:
            parts = [part for message in chat for part in message["content"]]
            image = getattr(self.processor, "image_token", "")
            return "".join(image if p["type"] == "image" else p["text"] for p in parts), None
        if not self._marked:
            return self.processor.apply_chat_template(chat), None
        text = self.processor.apply_chat_template(chat, chat_template=self._with_edges)
        pieces, marks, at = text.split(EDGE), [], 0
        for number, piece in enumerate(pieces):
            if number % 2:  # between two edges
                marks.append((at, at + len(piece)))
            at += len(piece)
        return "".join(pieces), marks

    @property
    def _marked(self) -> bool:
        return self._with_edges is not None

    @cached_property
    def _with_edges(self) -> str | None:
        """The template with a character for each edge of a mark; None for one without marks."""
        found = self.processor.chat_template
        template = found.get("default", "") if isinstance(found, dict) else found or ""
        edge = rf"{{%\1 if true %}}{EDGE}{{% endif \3%}}"
        marked, count = GENERATION_MARK.subn(edge, template)
        return marked if count else None

    @cached_property
    def _ends(self) -> set[int]:
        """Ids that end an answer where the template writes them behind it."""
        tokenizer = self.processor.tokenizer
        added = tokenizer.added_tokens_decoder.items()
        special = {number for number, token in added if token.special}
        return special | {*tokenizer.all_special_ids, *self.stops}

    def _end_of(self, after: str) -> tuple[int, str]:
        """The token that ends an answer, and the text up to it if the template writes one."""
        tokenizer = self.processor.tokenizer
        found = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        for token in found:
            if token in self._ends:
                text = tokenizer.convert_ids_to_tokens(token)
                return token, after[: after.index(text) + len(text)]
        return tokenizer.eos_token_id, ""


def message(role: str, text: str, images: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """A message with its images at their places in the text, ahead of a text without any."""
    first, *pieces = text.split(PLACE) if PLACE in text else [""] * len(images) + [text]
    parts = [[image, {"type": "text", "text": piece}] for image, piece in zip(images, pieces, strict=True)]
    content = [{"type": "text", "text": first}, *chain.from_iterable(parts)]
    return {"role": role, "content": [part for part in content if part.get("text") != ""] or content}


def images_of(chat: Chat) -> list[Any]:
    return [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]


def with_tokens(message: dict[str, Any], token: str) -> dict[str, Any]:
    """The message with images behind its first text as tokens in one text."""
    content = message["content"]
    start = next(i for i, part in enumerate(content) if part["type"] == "text")
    text = "".join(part.get("text", token) for part in content[start:])
    return {**message, "content": [*content[:start], {"type": "text", "text": text}]}


def marked_from(marks: Sequence[tuple[int, int]] | None, start: int) -> int | None:
    """Where the mark around the text at `start` begins: None without, 0 in a template without any."""
    if marks is None:
        return 0
    return next((first for first, last in marks if first <= start < last), None)
