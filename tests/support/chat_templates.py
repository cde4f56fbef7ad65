"""The chat templates that the families' models have on the hub, in the families' processors.

LLaVA-1.5's writes no end token, that of LLaVA-NeXT with Mistral misspells it, OneVision's writes another
prompt than for generation, and several end answers by another token than the tokenizer's own.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.families import CONFIGS
from tests.support.tiny import tiny_processor

IMAGES_FIRST = (
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>NEWLINE' }}{% endfor %}"
)
TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + IMAGES_FIRST.replace("NEWLINE", "\\n")
    + "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    + TEXTS
    + "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    + TEXTS
    + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES_FIRST.replace("NEWLINE", "\\n")
    + "{# Render all text next #}"
    + TEXTS
    + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + 'END '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    + IMAGES_FIRST.replace("NEWLINE", "")
    + "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    + TEXTS
    + "{{ '\\n' + content['text'] }}{% endfor %}{% else %}"
    + TEXTS
    + "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2 = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # the part without tools
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}{%- else %}"
    "{%- for content in messages[0].content %}{%- if 'text' in content %}{{- content.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set image_count = namespace(value=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{%- set image_count.value = image_count.value + 1 %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}"
    "{%- for content_item in message.content %}"
    "{%- if 'text' in content_item %}{{- content_item.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
IDEFICS = (
    "START{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
PIXTRAL = (
    '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"][0][\'text\'] %}'
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After the optional system message, conversation roles must alternate') }}{%- endif %}"
    '{%- if message["role"] == "user" %}{%- if loop.last and system_message is defined %}'
    '{{- "[INST]" + system_message + "\n\n" }}{%- else %}{{ "[INST]" }}{%- endif %}{%- endif %}'
    '{%- if message["content"] is not string %}{%- for chunk in message["content"] %}'
    '{%- if chunk["type"] == "text" %}{{- chunk["text"] }}'
    '{%- elif chunk["type"] == "image" %}{{- "[IMG]" }}'
    '{%- else %}{{- raise_exception("Unrecognized content type!") }}{%- endif %}{%- endfor %}'
    '{%- else %}{{- message["content"] }}{%- endif %}'
    '{%- if message["role"] == "user" %}{{- "[/INST]" }}'
    '{%- elif message["role"] == "assistant" %}{{- eos_token}}{%- endif %}{%- endfor %}'
)


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A family's processor with a template of the hub, the end token that it writes, and the tokenizer's own.

    `llama`: with a tokenizer of Llama's kind.
    """

    family: str
    template: str
    end: str
    eos: str = "</s>"
    specials: tuple[str, ...] = ()
    llama: bool = False

    def processor(self) -> Any:
        processor = tiny_processor() if self.family == "llava" else CONFIGS[self.family]()[1]
        if self.llama:
            processor.tokenizer = llama_tokenizer()
            processor.image_token_id = processor.tokenizer.image_token_id
        added = [AddedToken(text, special=True, normalized=False) for text in self.specials]
        processor.tokenizer.add_tokens(added, special_tokens=True)
        processor.tokenizer.eos_token = self.eos
        processor.chat_template = self.template
        return processor


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|box_start|>", "<|box_end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
HUB = {
    "llava-1.5": Hub(family="llava", template=LLAVA, end="</s>", llama=True),
    "llava-next-mistral": Hub(
        family="llava_next", template=MISTRAL.replace("END", "<\\\\s>"), end="</s>", llama=True
    ),
    "llava-next-mistral-mended": Hub(
        family="llava_next", template=MISTRAL.replace("END", "</s>"), end="</s>", llama=True
    ),
    "onevision": Hub(
        family="llava_onevision", template=ONEVISION, end="<|im_end|>", eos="<|im_end|>",
        specials=CHATML,
    ),
    "qwen2-vl": Hub(
        family="qwen2_vl", template=QWEN2, end="<|im_end|>", eos="<|im_end|>", specials=CHATML
    ),
    "qwen2.5-vl-base-eos": Hub(
        family="qwen2_5_vl", template=QWEN2, end="<|im_end|>", eos="<|endoftext|>", specials=CHATML
    ),
    "qwen3-vl": Hub(
        family="qwen3_vl", template=QWEN3, end="<|im_end|>", eos="<|im_end|>", specials=CHATML
    ),
    "idefics3": Hub(
        family="idefics3", template=IDEFICS.replace("START", "<|begin_of_text|>"),
        end="<end_of_utterance>", specials=("<|begin_of_text|>", "<end_of_utterance>"),
    ),
    "smolvlm": Hub(
        family="smolvlm", template=IDEFICS.replace("START", "<|im_start|>"),
        end="<end_of_utterance>", eos="<end_of_utterance>",
        specials=("<|im_start|>", "<end_of_utterance>"),
    ),
    "internvl3": Hub(
        family="internvl", template=INTERNVL, end="<|im_end|>", eos="<|im_end|>", specials=CHATML
    ),
    "gemma3": Hub(family="gemma3", template=GEMMA3, end="<end_of_turn>", specials=TURNS),
    "pixtral": Hub(  # its own processor is not one of the families'
        family="llava", template=PIXTRAL.replace("[IMG]", "<image>"), end="</s>", specials=("[INST]", "[/INST]")
    ),
}  # fmt: skip


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """BPE as Llama 1, 2 and Mistral have it: a blank before every text, bytes for rare characters."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [
        ("▁", "r"),
        ("▁r", "e"),
        ("▁re", "d"),
        ("r", "e"),
        ("re", "d"),
        ("▁", "a"),
        ("▁", "▁"),
    ]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{code:02X}>" for code in range(256)), "▁", *letters]
    words += ["".join(pair) for pair in merges]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blank = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([blank, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
