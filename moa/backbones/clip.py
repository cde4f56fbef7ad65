"""CLIP and SigLIP of transformers behind the few operations that the mixture needs: two towers, each run by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from data.batch import Batch
from data.prompt import Intake
from moa.backbones.clip_processor import ClipProcessor, of_transformers
from moa.backbones.llava import Look
from moa.backbones.loading import faults_of, load_weights, read_any_config

FAMILIES = ("clip", "siglip")


@dataclass(frozen=True, kw_only=True)
class ClipBackbone:
    """A dual encoder and its processor; the model itself stays unmodified."""

    model: Any  # CLIPModel or SiglipModel
    processor: ClipProcessor
    dims: dict[str, int]  # widths of the towers' tokens: image, text
    name: str = ""
    fingerprint: str | None = None  # of its weights and config

    compares: ClassVar[bool] = True
    # Neither DeepSpeed nor FSDP2 takes the scale of the logits, a scalar. And with losses.pairs=classification
    # each process would read the texts of the choices that it meets first, and wait for the others.
    shardable: ClassVar[bool] = False
    recomputes: ClassVar[bool] = True
    task_type: ClassVar[str | None] = None  # PEFT would look for a language model's methods

    @property
    def intake(self) -> Intake:
        return Intake(processor=self.processor, context_length=self.processor.context_length)

    @property
    def embedding(self) -> Any:
        return self.model.text_model.embeddings.token_embedding

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def is_sigmoid(self) -> bool:
        """Trained by SigLIP's loss, whose logits have a bias."""
        return getattr(self.model, "logit_bias", None) is not None

    def logits(
        self, first: Float[Tensor, "rows dim"], second: Float[Tensor, "columns dim"]
    ) -> Float[Tensor, "rows columns"]:
        """Scaled similarity of normalised features, as the model's own loss reads it."""
        bias = self.model.logit_bias.float() if self.is_sigmoid else 0.0
        return self.model.logit_scale.float().exp() * first @ second.T + bias

    def image_features(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images dim"]:
        return F.normalize(self._image_features(pixel_values.to(self.dtype)).float(), dim=-1)

    def text_features(
        self, input_ids: Int[Tensor, "texts seq"], attention_mask: Int[Tensor, "texts seq"]
    ) -> Float[Tensor, "texts dim"]:
        """Normalised, in float32; pooled where the model itself does, which loading has checked."""
        return F.normalize(self._text_features(input_ids, attention_mask).float(), dim=-1)

    def owners(self, batch: Batch) -> dict[str, Int[Tensor, " _"]]:
        """By stream of sites, the sample of each row on their first axis; texts have a row each."""
        return {"image": batch.image_index}

    def owners_of(self, inputs: Mapping[str, Tensor]) -> dict[str, Int[Tensor, " _"]]:
        """The same from the model's own inputs, as many images as texts."""
        return {"image": torch.arange(len(inputs["pixel_values"]))}

    def inputs_of(self, batch: Batch) -> dict[str, Tensor]:
        """What the model's own forward takes; SigLIP learned without a mask."""
        names = ("input_ids", "pixel_values", *(() if self.is_sigmoid else ("attention_mask",)))
        return {name: getattr(batch, name) for name in names}

    def probe(self, images: Sequence[Any], texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's own inputs for as many images as texts."""
        ids, mask = self.processor.texts(texts)
        inputs = {"pixel_values": self.processor.images(images), "input_ids": ids}
        return inputs if self.is_sigmoid else inputs | {"attention_mask": mask}

    def look(self, batch: Batch) -> Look:
        """What the router sees: the vision tower's last hidden states; call it inside `context.disabled()`."""
        pixels = batch.pixel_values
        if len(pixels):
            tokens = self._image_tokens(pixels.to(self.dtype))
        else:
            tokens = pixels.new_zeros(0, 1, self.dims["image"])
        return Look(tokens=tokens, owner=batch.image_index, tower=None, features=None)

    def embed(self, ids: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead width"]:
        return self.embedding(ids)

    def stream_of(self, site: str) -> str:
        """Whether a layer's first axis counts images ("image") or texts ("text")."""
        return "image" if site.startswith(("vision_model.", "visual")) else "text"

    def unused_sites(self) -> list[str]:
        return []

    def pooled_place(self, ids: Int[Tensor, " seq"]) -> tuple[str, int | None]:
        """The rule by which a text is pooled, and where; None where that is no token's own place."""
        config = self.model.config
        if config.model_type == "siglip":
            return "the last position", None
        end, vocabulary = config.text_config.eos_token_id, self.processor.tokenizer.get_vocab()
        if end != 2:
            return f"id {end}", int((ids == end).int().argmax())
        largest = int(ids.max()) == max(vocabulary.values())  # no other token may win
        return "the largest id", int(ids.argmax()) if largest else 0

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # SigLIP learned without a mask: its padding is part of the text.
        masked = self.model.config.model_type == "clip"
        mask = {"attention_mask": attention_mask} if masked else {}
        return self.model.get_text_features(input_ids=input_ids, **mask).pooler_output

    def _image_tokens(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).last_hidden_state


def is_clip(name: str) -> bool:
    """Whether this name or folder is a dual encoder of transformers; only its config is read."""
    try:
        return read_any_config(name).model_type in FAMILIES
    except ValueError:  # loading names what is wrong with it
        return False


def load_clip(name: str, dtype: torch.dtype = torch.float32) -> ClipBackbone:
    """A frozen dual encoder from a local folder or by its hub name, in eval mode. Raises ValueError for a text tower
    that would not pool at the end of a text."""
    model = load_weights(AutoModel, name, dtype=dtype)
    config = model.config
    widths = {"image": config.vision_config.hidden_size, "text": config.text_config.hidden_size}
    with faults_of(name, "processor"):
        processor = of_transformers(AutoProcessor.from_pretrained(name), config)
    backbone = ClipBackbone(model=model.eval().requires_grad_(False), processor=processor, dims=widths, name=name)
    check_end_of_text(backbone)
    return backbone


def check_end_of_text(backbone: ClipBackbone) -> None:
    """ValueError where the text tower would not pool at the end of the text.

    CLIP of transformers looks for `eos_token_id`; at 2, which old configs have by mistake, for the largest id instead.
    Where that finds nothing, it silently pools at position 0, which under a causal mask is the same for every text.
    """
    ids, mask = backbone.processor.texts(["a"])
    rule, place = backbone.pooled_place(ids[0])
    if place is not None and place != int(mask.sum()) - 1:
        raise ValueError(
            f"model: {backbone.name}: its text tower pools at {rule}, which is token {place} of "
            f"{ids[0].tolist()}, and not the end of the text; its tokenizer belongs to another "
            "model, or text_config.eos_token_id is wrong"
        )
