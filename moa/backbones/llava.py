"""The LLaVA family of transformers behind the few operations that the mixture needs.

    look      tower and projector without experts: what the router sees
    features  the images as the language model reads them, with the gates that are set

What differs between architectures is a row of families.py. The model stays as it is: inside a `with`, a method of one
of its modules gives back what was computed before.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from data.batch import Batch
from data.chat import ChatEncoder
from data.prompt import Intake
from moa.backbones.families import FAMILIES, Family, image_rows
from moa.backbones.loading import load_weights, quantization_config, read_any_config
from moa.backbones.processors import PROBE, box_convention, open_processor
from moa.packing import restart_positions

VISION_LAYER = re.compile(r"\.(?:layers?|blocks)\.(\d+)\.")
PACKING = ("sdpa", "eager", "flex_attention")  # attention that heeds restarting positions


@dataclass(frozen=True, kw_only=True)
class Look:
    """The images of a batch as the backbone without experts sees them."""

    tokens: Float[Tensor, "rows patch image"]  # what the projector reads
    owner: Int[Tensor, " rows"]  # the sample of each row
    tower: Any  # the tower's output
    features: Any  # the output of get_image_features


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A vision-language model of Hugging Face and its processor; the model itself stays unmodified."""

    model: Any  # a ...ForConditionalGeneration
    processor: Any
    name: str = ""
    fingerprint: str | None = None  # of its weights and config

    compares: ClassVar[bool] = False  # images with texts; else it answers in tokens
    shardable: ClassVar[bool] = True  # by DeepSpeed ZeRO and FSDP2
    recomputes: ClassVar[bool] = True  # in the backward pass, with the gates it first had
    task_type: ClassVar[str | None] = "CAUSAL_LM"  # PEFT's word in an adapter's config

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.config.model_type]

    @property
    def intake(self) -> Intake:
        return intake_of(self.processor, self.family, self.model.generation_config)

    @property
    def dims(self) -> dict[str, int]:
        config = self.model.config
        return {"image": self.family.image_width(config), "text": config.text_config.hidden_size}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def owners(self, batch: Batch) -> dict[str, Int[Tensor, " _"]]:
        """By stream of sites, the sample of each row on their first axis. Raises ValueError where prompts and images do
        not fit: a prompt was cut, or images miss."""
        both = self._tokens_per_sample(batch), self._images(batch)
        return image_rows(*both, batch.image_index, self.model.config, self.family)

    def owners_of(self, inputs: Mapping[str, Tensor]) -> dict[str, Int[Tensor, " _"]]:
        """The same from the model's own inputs, where a prompt has at most one image."""
        counts = self._image_tokens(inputs["input_ids"]).sum(1)
        with_image = counts.nonzero()[:, 0]
        return image_rows(counts, inputs, with_image, self.model.config, self.family)

    def inputs_of(self, batch: Batch) -> dict[str, Tensor]:
        """What the model's own forward and generate take for a batch."""
        return {**self._prompt(batch), **({} if batch.is_blank else self._images(batch))}

    def look(self, batch: Batch) -> Look:
        """What the images are without experts; call it inside `context.disabled()`."""
        seen: dict[str, Any] = {}
        tower = self.model.get_submodule(self.family.tower)
        projector = self.model.get_submodule(self.family.projectors[0])
        with (
            tower.register_forward_hook(lambda *call: seen.update(tower=call[-1])),
            projector.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0])),
        ):
            features = self.features(batch)
        owner, tokens = self.owners(batch)["image"], seen["tokens"]
        tokens = tokens if tokens.dim() == 3 else tokens[:, None]
        return Look(tokens=tokens, owner=owner, tower=seen["tower"], features=features)

    def features(self, batch: Batch, tower: Any = None) -> Any:
        """The output of get_image_features; `tower` is the tower's output, where it was computed before."""
        module, read = self.model.get_submodule(self.family.tower), lambda *_, **__: tower
        with nullcontext() if tower is None else answering(module, "forward", read):
            return self.model.model.get_image_features(**self._images(batch), return_dict=True)

    def embed(self, ids: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead width"]:
        return self.model.get_input_embeddings()(ids)

    def hidden_states(self, batch: Batch, features: Any) -> Float[Tensor, "rows seq width"]:
        """The language model's last hidden states; positions count from the first real token.

        In packed rows each sample's count from its own, and where they restart attention ends. Then no mask goes along:
        transformers would take it for the whole truth, and samples would see each other.
        """
        inputs = self._prompt(batch)
        first = self.family.first_position
        if batch.segments is not None:
            check_packing(self.model.config, len(batch.segments))
            inputs["position_ids"] = restart_positions(batch.segments)
            del inputs["attention_mask"]
        elif first is not None:
            counted = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = counted + first
        if batch.is_blank:
            # The image is in no prompt, but its layers take part on every rank (DDP, ZeRO-3), and
            # through the prompt, so that gradients come in the same order on all (FSDP2).
            further = getattr(features, "deepstack_features", None) or ()  # Qwen3-VL
            nothing = 0.0 * _total([features.pooler_output, further])
            embeddings = self.model.get_input_embeddings()
            with embeddings.register_forward_hook(lambda _, args, output: output + nothing):
                return self.model.model(**inputs, use_cache=False).last_hidden_state
        with self._with_features(features, batch):
            output = self.model.model(**inputs, **self._images(batch), use_cache=False)
        return output.last_hidden_state

    def logits(self, hidden: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead vocab"]:
        logits = self.model.lm_head(hidden)
        cap = getattr(self.model.config.text_config, "final_logit_softcapping", None)
        if self.family.softcap and cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def generate(self, batch: Batch, features: Any, **kwargs: Any) -> Int[Tensor, "rows new"]:
        """New token ids alone; a row per sample and return sequence."""
        stops = {*stops_of(self.model.generation_config)}
        if self.end not in stops:  # what is learned as the end of an answer ends it
            kwargs.setdefault("eos_token_id", [*stops, self.end])
        with self._with_features(features, batch):
            ids = self.model.generate(**self.inputs_of(batch), **kwargs)
        return ids[:, batch.input_ids.shape[1] :]

    @cached_property
    def end(self) -> int:
        """The token that is learned as the end of an answer."""
        return ChatEncoder(self.processor, self.intake.stops).dialogue(PROBE).end

    def stream_of(self, site: str) -> str:
        """What the first axis of a layer counts: samples ("text"), rows of the tower ("image"), or
        where a row is a patch, the merged patches that the projector reads ("merged")."""
        if _inside(site, *self.family.projectors):
            return "merged" if self.family.rows == "patches" else "image"
        return "image" if _inside(site, self.family.tower) else "text"

    def unused_sites(self) -> list[str]:
        """Linear layers of the vision tower whose output never reaches the language model."""
        layers = (n for n, m in self.model.named_modules() if isinstance(m, nn.Linear))
        return [n for n in layers if _inside(n, self.family.tower) and not self._is_read(n)]

    def _is_read(self, name: str) -> bool:
        if _inside(name, *self.family.projectors):
            return True
        match = VISION_LAYER.search(name)
        if match is None:
            return "embeddings" in name
        layers = self.family.feature_layers(self.model.config)
        if layers is None:
            return True
        count = self.model.config.vision_config.num_hidden_layers
        # hidden_states has the embeddings first: entry i is read from layers 0 .. i - 1.
        read = [layers] if isinstance(layers, int) else layers
        return int(match[1]) < max(i if i >= 0 else count + 1 + i for i in read)

    def _image_tokens(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.model.config.image_token_id

    def _tokens_per_sample(self, batch: Batch) -> Int[Tensor, " batch"]:
        places = self._image_tokens(batch.input_ids)
        if batch.segments is None:
            return places.sum(1)
        return torch.bincount(batch.segments[places], minlength=len(batch))

    def _prompt(self, batch: Batch) -> dict[str, Tensor]:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.family.token_types is not None:
            name, marked = self.family.token_types
            if marked == "image":
                types = self._image_tokens(batch.input_ids)
            elif batch.labels is not None:
                types = batch.labels != -100
            else:
                types = torch.zeros_like(batch.input_ids)
            inputs[name] = types.long()
        return inputs

    def _images(self, batch: Batch) -> dict[str, Tensor]:
        known = inspect.signature(self.model.model.get_image_features).parameters
        further = {name: value for name, value in batch.image_inputs.items() if name in known}
        return {"pixel_values": batch.pixel_values.to(self.dtype), **further}

    @contextmanager
    def _with_features(self, features: Any, batch: Batch) -> Iterator[None]:
        """Inside, the model takes these features for the batch's images."""
        rows, counts = batch.pixel_values.shape[0], self._tokens_per_sample(batch)

        @functools.wraps(self.model.model.get_image_features)  # generate reads the signature
        def features_of(pixel_values: Tensor, *_: Any, **__: Any) -> Any:
            times = pixel_values.shape[0] // rows
            return features if times == 1 else repeated(features, times, counts)

        with answering(self.model.model, "get_image_features", features_of):
            yield


def check_packing(config: Any, num_rows: int) -> None:
    """ValueError where the attention in use would let samples of a packed row see each other."""
    if FAMILIES[config.model_type].token_types is not None:
        simple = [name for name, family in FAMILIES.items() if family.token_types is None]
        raise ValueError(
            f"train.pack_length: {config.model_type} has positions or masks of its own; choices: {', '.join(simple)}"
        )
    attention = config.text_config._attn_implementation
    if attention not in PACKING and not ("flash" in attention and num_rows == 1):
        raise ValueError(
            f"train.pack_length: {attention} attention does not separate the samples of {num_rows} "
            f"rows; choices: {', '.join(PACKING)}, flash attention with all samples in one row"
        )


@contextmanager
def answering(module: nn.Module, method: str, answer: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get(method)
    object.__setattr__(module, method, answer)
    try:
        yield
    finally:
        object.__delattr__(module, method)
        if before is not None:
            object.__setattr__(module, method, before)


def repeated(features: Any, times: int, counts: Int[Tensor, " batch"]) -> Any:
    """Features for prompts that generation has repeated `times` each, as transformers before 5.23
    does ahead of the images; later ones repeat the features themselves.

    `counts` are the image tokens of each sample: a sample's entries (images, or tiles) are repeated
    as a whole. Raises ValueError for features of several layers (Qwen3-VL).
    """
    if getattr(features, "deepstack_features", None) is not None:
        raise ValueError("num_beams, num_return_sequences: above 1 this needs transformers >= 5.23")
    entries: Any = features.pooler_output
    sizes = torch.tensor([len(entry) for entry in entries])
    owner = torch.searchsorted(counts.cumsum(0).cpu(), sizes.cumsum(0) - sizes, right=True)
    samples = [(owner == sample).nonzero()[:, 0].tolist() for sample in range(len(counts))]
    order = [i for own in samples for _ in range(times) for i in own]
    copy, whole = type(features)(**features), isinstance(entries, Tensor)
    copy.pooler_output = entries[order] if whole else [entries[i] for i in order]
    return copy


def _total(parts: Any) -> Any:
    """The sum of all numbers in tensors, nested in sequences."""
    return parts.sum() if isinstance(parts, Tensor) else sum(map(_total, parts))


def _inside(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def intake_of(processor: Any, family: Family, generation: Any) -> Intake:
    return Intake(
        processor=processor,
        box_codec=box_convention(family, processor.tokenizer),
        text_only=family.text_only,
        one_image=only_one_image(family),
        stops=stops_of(generation),
    )


def only_one_image(family: Family) -> str:
    """Why a sample has one image at most; empty for a family that takes several."""
    name = next((kind for kind, row in FAMILIES.items() if row is family), "base")
    choices = ", ".join(kind for kind, row in FAMILIES.items() if row.several_images)
    return "" if family.several_images else f"a {name} was trained on one a sample; bases that take several: {choices}"


def stops_of(generation: Any) -> tuple[int, ...]:
    found = getattr(generation, "eos_token_id", None)
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def open_intake(name_or_path: str, image_processor: Mapping[str, Any] | None = None) -> Intake:
    """What data needs of a base, without its weights."""
    config = read_config(name_or_path)
    try:
        generation = GenerationConfig.from_pretrained(name_or_path)
    except OSError:  # many bases have none
        generation = GenerationConfig.from_model_config(config)
    processor = open_processor(name_or_path, image_processor)
    return intake_of(processor, FAMILIES[config.model_type], generation)


def load_backbone(
    name_or_path: str,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    image_processor: Mapping[str, Any] | None = None,
) -> Backbone:
    """A frozen model of the family from a local folder or by its hub name, in eval mode.

    `image_processor` are settings that its image processor is to have. Raises ValueError for what is neither, for other
    architectures, and for a quantization ("4bit", "8bit") that this machine cannot run.
    """
    read_config(name_or_path)
    options = quantization_config(quantization, dtype)
    processor = open_processor(name_or_path, image_processor)
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights: in a log it is noise
    model = load_weights(AutoModelForImageTextToText, name_or_path, dtype=dtype, **options)
    return Backbone(model=model.eval().requires_grad_(False), processor=processor, name=name_or_path)


def read_config(name_or_path: str) -> Any:
    config = read_any_config(name_or_path)
    if config.model_type not in FAMILIES:
        raise ValueError(f"model: {name_or_path} is a {config.model_type}; choices: {', '.join(FAMILIES)}")
    return config
