"""Chats -> token ids and where the answers are, by any processor of the family.

Where the chat template marks the answer by `{% generation %}` the mark holds; without marks the answer is
what the template puts behind the prompt; without a template (PaliGemma) the prompt is the pictures,
the text, and the answer. An answer always ends with a token that ends generation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GENERATION_MARK = re.compile(r"\{%-?\s*generation")
Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class ChatEncoder:
    processor: Any  # of transformers

    def encode(
        self, chats: list[Chat], pictures: Sequence[Sequence[Any]], *, prompts: bool
    ) -> dict[str, Any]:
        """Token ids and assistant masks as lists of unequal length, and the pictures of each chat.

        Lists, because the processor walks over them token by token to make the mask, and walking
        over tensors costs more than everything else together. `prompts`: up to the first answer,
        without masks. Raises ValueError for a template that leaves no answer to learn from.
        """
        template = self.processor.chat_template
        if prompts:
            return self._encode_prompts(chats, pictures)
        if template is not None and GENERATION_MARK.search(str(template)):
            encoded = self._encode_marked(chats)
        else:
            encoded = self._encode_prompts(chats, pictures)
            replies = [self.replies(chat) for chat in chats]
            pairs = list(zip(encoded["input_ids"], replies, strict=True))
            encoded["assistant_masks"] = [[0] * len(p) + mask for p, (_, mask) in pairs]
            encoded["input_ids"] = [[*p, *ids] for p, (ids, _) in pairs]
        if not all(map(any, encoded["assistant_masks"])):
            raise ValueError(
                "the processor's chat template leaves nothing to learn from: no answer"
            )
        return encoded

    def _encode_marked(self, chats: list[Chat]) -> dict[str, Any]:
        encoded = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors=None,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False},
        )
        tokenizer = self.processor.tokenizer
        for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            last = max((i for i, marked in enumerate(mask) if marked), default=None)
            if last is not None and ids[last] not in tokenizer.all_special_ids:
                ids[last + 1 :], mask[last + 1 :] = [tokenizer.eos_token_id], [1]
        return encoded

    def _encode_prompts(
        self, chats: list[Chat], pictures: Sequence[Sequence[Any]]
    ) -> dict[str, Any]:
        """The prompts' ids, exactly as generation will see them, and the pictures."""
        encoded = self.processor(
            text=[self._prompt_text(opening_of(chat)) for chat in chats],
            images=list(pictures) if any(pictures) else None,
            padding=True,  # PaliGemma's processor cannot do without
        )
        rows = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        ids = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
        return {**encoded, "input_ids": ids}

    def _prompt_text(self, chat: Chat) -> str:
        """What stands before an answer: all of the chat, and the start of the assistant's turn."""
        if self.processor.chat_template is not None:
            return self.processor.apply_chat_template(chat, add_generation_prompt=True)
        parts = [part for message in chat for part in message["content"]]
        texts = (self.processor.image_token if p["type"] == "image" else p["text"] for p in parts)
        return "".join(texts)

    def replies(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Ids of everything behind the opening prompt, and 1 where an answer or its end stands.

        Raises ValueError for a template that writes what is past another way once there is more.
        """
        tokenizer, ids, mask = self.processor.tokenizer, [], []
        done = self._prompt_text(opening_of(chat))
        for place, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            answer = message["content"][0]["text"].strip()
            prompt, before, after = self._prompt_text(chat[:place]), "", ""
            if self.processor.chat_template is not None:
                whole = self.processor.apply_chat_template(chat[: place + 1])
                before, _, after = whole.removeprefix(prompt).rpartition(answer)
                if not whole.startswith(prompt + before + answer) or not prompt.startswith(done):
                    raise ValueError(
                        "the processor's chat template rewrites the prompt once there is an answer:"
                        " put {% generation %} around the assistant's text in it"
                    )
            asked = tokenizer(prompt.removeprefix(done), add_special_tokens=False)["input_ids"]
            said = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
            end, rest = self._end_of(after)
            ids += [*asked, *said, end]
            mask += [0] * len(asked) + [1] * (len(said) + 1)
            done = prompt + before + answer + rest
        return ids, mask

    def _end_of(self, after: str) -> tuple[int, str]:
        """The token that ends an answer, and its text if the template has one behind the answer."""
        tokenizer = self.processor.tokenizer
        found = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        for token in found:
            if token in tokenizer.all_special_ids:
                text = tokenizer.convert_ids_to_tokens(token)
                return token, after[: after.index(text) + len(text)]
        return tokenizer.eos_token_id, ""


def message(role: str, text: str, picture: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"role": role, "content": [*picture, {"type": "text", "text": text}]}


def opening_of(chat: Chat) -> Chat:
    """The messages before the first answer."""
    roles = [message["role"] for message in chat]
    return chat[: roles.index("assistant")] if "assistant" in roles else chat
