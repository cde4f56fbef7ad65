"""The LLaVA family of transformers behind the few operations that the mixture needs.

Vision tower, projector and language model are run one after the other, so that the router can look
at the tower's tokens before any expert runs, and nothing is computed twice.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

FAMILIES = ("llava",)
PACKING = ("sdpa", "eager", "flex_attention")  # attention that heeds restarting positions
VISION, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A Hugging Face LLaVA and its processor; the model itself stays unmodified."""

    model: Any  # LlavaForConditionalGeneration
    processor: Any
    name: str = ""

    @property
    def dims(self) -> dict[str, int]:
        """Widths of the image tokens and of the language model's embeddings."""
        layers = self.model.config.vision_feature_layer
        num_layers = 1 if isinstance(layers, int) else len(layers)
        width = self.model.config.vision_config.hidden_size * num_layers
        return {"image": width, "text": self.model.config.text_config.hidden_size}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def image_tokens(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images patch image"]:
        """The vision tower's tokens that the projector reads."""
        config = self.model.config
        tower = self.model.model.vision_tower
        pixels = pixel_values.to(next(tower.parameters()).dtype)
        states = tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]  # the class token has no place
        return torch.cat(chosen, dim=-1)

    def project(
        self, tokens: Float[Tensor, "images patch image"]
    ) -> Float[Tensor, "images patch width"]:
        """Image tokens as the language model reads them."""
        return self.model.model.multi_modal_projector(tokens)

    def embed(self, ids: Int[Tensor, "*lead"]) -> Float[Tensor, "*lead width"]:
        """The language model's input embeddings."""
        return self.model.get_input_embeddings()(ids)

    def inputs_embeds(
        self,
        input_ids: Int[Tensor, "batch seq"],
        image_features: Float[Tensor, "images patch width"],
    ) -> Float[Tensor, "batch seq width"]:
        """The prompt's embeddings, with the pictures' features at the image tokens, in order.

        Raises ValueError where the prompt has another number of image tokens than there are
        features: a prompt was cut, or pictures are missing.
        """
        embeds = self.embed(input_ids)
        places = input_ids == self.model.config.image_token_index
        features = image_features.flatten(0, 1)
        if int(places.sum()) != features.shape[0]:
            raise ValueError(
                f"input_ids have {int(places.sum())} image tokens for {features.shape[0]} image "
                "features; was a prompt truncated, or a picture left out?"
            )
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))

    def hidden_states(
        self,
        embeds: Float[Tensor, "batch seq width"],
        attention_mask: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq width"]:
        """The language model's last hidden states; positions count from the first real token.

        Where `positions` are given, each restart begins a sample that attends to itself alone. Then
        no mask goes along: transformers would take it for the whole truth, and samples would see
        each other.
        """
        if positions is None:
            positions, mask = (attention_mask.cumsum(1) - 1).clamp(min=0), attention_mask
        else:
            check_packing(self.model.config, len(positions))
            mask = None
        output = self.model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )
        return output.last_hidden_state

    def logits(self, hidden: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead vocab"]:
        return self.model.lm_head(hidden)

    def generate(
        self,
        embeds: Float[Tensor, "batch seq width"],
        attention_mask: Int[Tensor, "batch seq"],
        **kwargs: Any,
    ) -> Int[Tensor, "rows new"]:
        """New token ids alone; a row per sample and return sequence."""
        return self.model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def stream_of(self, site: str) -> str:
        """Whether a layer's first axis counts pictures ("image") or samples ("text")."""
        return "image" if site.startswith((VISION, PROJECTOR)) else "text"

    def unused_sites(self) -> list[str]:
        """Linear layers of the vision tower whose output never reaches the language model."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith(VISION)
            and not self._is_read(name.removeprefix(VISION))
        ]

    def _is_read(self, name: str) -> bool:
        layers = self.model.config.vision_feature_layer
        count = self.model.config.vision_config.num_hidden_layers
        # hidden_states has the embeddings first: entry i is read from layers 0 .. i - 1.
        last = max(
            i if i >= 0 else count + 1 + i
            for i in ([layers] if isinstance(layers, int) else layers)
        )
        match = re.search(r"\blayers\.(\d+)\.", name)
        return int(match[1]) < last if match else "embeddings" in name


def check_packing(config: Any, num_rows: int) -> None:
    """ValueError where the attention in use would let samples of a packed row see each other."""
    attention = config.text_config._attn_implementation
    if attention not in PACKING and not ("flash" in attention and num_rows == 1):
        raise ValueError(
            f"train.pack_length: {attention} attention does not separate the samples of {num_rows} "
            f"rows; choices: {', '.join(PACKING)}, flash attention with all samples in one row"
        )


def load_backbone(name_or_path: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A frozen LLaVA from a local folder or by its hub name, in eval mode.

    Raises ValueError for what is neither, and for other families.
    """
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise ValueError(f"model: {name_or_path} is no folder")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except OSError as error:  # transformers takes a folder that is not there for a hub name
        raise ValueError(
            f"model: {name_or_path} is no folder with a config.json here, and the hub gave no model "
            f"of this name: {str(error).splitlines()[0]}"
        ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: {name_or_path} is a {config.model_type}; choices: {', '.join(FAMILIES)}"
        )
    if not sys.stderr.isatty():
        disable_progress_bar()  # of loading weights: in a log it is noise
    model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
    processor = AutoProcessor.from_pretrained(name_or_path)
    return Backbone(
        model=model.eval().requires_grad_(False), processor=processor, name=name_or_path
    )
