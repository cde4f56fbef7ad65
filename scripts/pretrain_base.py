"""Pretrain the demo's base: a tiny real LLaVA, from nothing, on scenes of the `pretrain` split.

    python scripts/pretrain_base.py --out assets/demo_base --ocr OCR.parquet

1. a CLIP vision tower learns to name what lies under each of its patches, and where that begins and ends;
2. its features of every scene are computed once;
3. projector and Llama learn a generic mixture of every task on these features. Beside it the projected patches are
   taught to look like the words that name them, attention starts out looking for tokens like its own, and two heads
   are taught to look from a name, two more from the answer that places it, to the patches that show it. Without that
   a decoder this small takes very long to find the things that a question names, or to copy a word.

Several questions about one picture share a row: each sees the picture and itself, nothing else.
The OCR words come from `python scripts/ocr.py --scenes pretrain:6000 --out OCR.parquet`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.boxes import location_tokens
from data.concepts import CATEGORY, GROUNDS, SPLITS
from data.geometry import whole
from data.ocr import OcrCache, content_hash
from data.questions import TASKS, Question, questions
from data.scenes import SIZE, Scene, render_scene

IMAGE_SIZE, PATCH, WIDTH, LAYERS, NUM_BINS = 96, 12, 192, 4, 32
POINTING, POINTING_HEADS = {"names": 1, "places": 2}, 2  # which tokens, in which layer
NUM_PATCHES = (IMAGE_SIZE // PATCH) ** 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + c['text'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ c['text'] + '\nanswer:' }}{% endif %}{% endfor %}{% endfor %}"
)
Take = Callable[..., None]
LABELS = ("sign", *GROUNDS, *CATEGORY)  # what a patch can be called
MIXTURE = {  # the base is a generalist: the experts' own tasks are a part of what it sees
    "vqa": 2.0, "caption": 0.7, "grounding": 1.2, "ocr_vqa": 1.2, "count": 0.7, "yes_no": 1.5,
}  # fmt: skip


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the questions' words; capitals, as on signs, stay single characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        min_frequency=4,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=512,
    )  # fmt: skip
    places = [AddedToken(f"<loc{i:04d}>", normalized=False) for i in range(NUM_BINS)]
    fast.add_tokens(places)
    fast.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    fast.image_token = "<image>"
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures are squeezed to a square, so that boxes keep their place in parts of the side."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=6, image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=512,
        num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=6,
        max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.05,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=NUM_PATCHES,
        image_token_index=int(tokenizer.convert_tokens_to_ids("<image>")),  # type: ignore[arg-type]
        vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        look_for_the_like(layer.self_attn)
    return model


def look_for_the_like(attention: Any) -> None:
    """Equal queries and keys: a token first attends to tokens like its own (Trockman & Kolter 2023, section 3)."""
    attention.q_proj.weight.data.copy_(attention.k_proj.weight.data)


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What covers most of each patch: [patches] its label, [patches, 4] its box in parts of the side.

    The ground has no box: its patches hold NaN.
    """
    owner = np.zeros((SIZE, SIZE), dtype=np.int64)
    covers = [(scene.ground, (np.nan,) * 4)]
    if scene.sign:
        covers.append(("sign", scene.sign.box))
    covers += [(thing.name, thing.box) for thing in scene.things]
    for number, (_, box) in enumerate(covers[1:], start=1):
        x0, y0, x1, y1 = map(int, box)
        owner[y0:y1, x0:x1] = number
    side = IMAGE_SIZE // PATCH
    cells = owner.reshape(side, SIZE // side, side, SIZE // side).transpose(0, 2, 1, 3)
    counts = np.apply_along_axis(np.bincount, 1, cells.reshape(side * side, -1), None, len(covers))
    most = counts.argmax(1)
    labels = np.array([LABELS.index(name) for name, _ in covers])
    boxes = np.array([box for _, box in covers], dtype=np.float32) / SIZE
    return labels[most], boxes[most]


@dataclass(frozen=True, kw_only=True)
class World:
    """The pretraining scenes as the model sees them."""

    scenes: list[Scene]
    pixel_values: Tensor  # [scenes, 3, height, width] float16
    labels: Tensor  # [scenes, patches]
    boxes: Tensor  # [scenes, patches, 4] in parts of the side; NaN on the ground
    hashes: list[str]  # of the pictures, as the OCR cache knows them


def draw_world(processor: LlavaProcessor, num_scenes: int, seed: int) -> World:
    scenes, pixels, covers, hashes = [], [], [], []
    for start in _track(range(0, num_scenes, 100), "draw"):
        drawn = [render_scene("pretrain", i, seed) for i in range(start, start + 100)]
        images = [image for image, _ in drawn]
        batch = processor.image_processor(images=images, return_tensors="pt")
        pixels.append(batch["pixel_values"].half())
        hashes += [content_hash(image) for image in images]
        scenes += [scene for _, scene in drawn]
        covers += [patch_labels(scene) for _, scene in drawn]
    labels, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*covers, strict=True))
    return World(
        scenes=scenes, pixel_values=torch.cat(pixels), labels=labels, boxes=boxes, hashes=hashes
    )


def read_words(world: World, cache_file: Path) -> list[str | None]:
    """What the OCR engine read in each scene; None where it did not look."""
    read = OcrCache(cache_file).table
    return [" ".join(w.text for w in read[key]) if key in read else None for key in world.hashes]


def name_patches(tower: nn.Module, world: World, args: argparse.Namespace) -> float:
    """Stage 1: cross-entropy of each patch with what it shows, and the L1 distance of its box.

    Naming alone makes the tower forget where a patch lies, and no decoder can tell it afterwards.
    Returns the share of foreground patches that it names rightly.
    """
    head = nn.Linear(WIDTH, len(LABELS) + 4).to(args.device)
    weight = torch.tensor([0.3 if name in GROUNDS else 1.0 for name in LABELS], device=args.device)
    parameters = [*tower.parameters(), *head.parameters()]
    right = 0.0
    for rows, take in _steps(
        parameters, args.tower_steps, len(world.scenes), 64, 1e-3, args, "tower"
    ):
        pixels = world.pixel_values[rows].to(args.device).float()
        target, true_box = world.labels[rows].to(args.device), world.boxes[rows].to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            out = head(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]).float()
        logits, box = out.split([len(LABELS), 4], -1)
        named = F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight=weight)
        bounded = ~true_box.isnan().any(-1)
        distance = F.l1_loss(box[bounded], true_box[bounded])
        front = target > len(GROUNDS)
        share = (logits.argmax(-1) == target)[front].float().mean().item()
        right = 0.98 * right + 0.02 * share
        take(named + 5 * distance, name=named.item(), foreground=share, box=distance.item())
    return right


@torch.no_grad()
def encode_scenes(tower: nn.Module, world: World, device: str) -> Tensor:
    """Stage 2: [scenes, patches, width] features of every scene, in half precision."""
    return torch.cat([
        tower(chunk.to(device).float(), output_hidden_states=True).hidden_states[-1][:, 1:].half().cpu()
        for chunk in _track(world.pixel_values.split(128), "encode")
    ])  # fmt: skip


def prompt(question: Question, wording: str, words: str | None, with_task: bool) -> str:
    """As the collator writes it: prefix, question, OCR words."""
    prefix = f"[{question.task}] " if with_task else ""
    evidence = f"\nocr: {words}" if words else ""
    return f"{prefix}{wording}{evidence}\nanswer:"


@dataclass(frozen=True, kw_only=True)
class Asked:
    task: str
    prompt: str
    answer: str
    name: str | None  # of the thing that the question is about, if it names one
    asks_where: bool


def ask(scene: Scene, words: str | None, rng: np.random.Generator) -> Asked | None:
    """A random question about a scene, or None if its task has none here."""
    task = str(rng.choice(TASKS, p=np.array([MIXTURE[t] for t in TASKS]) / sum(MIXTURE.values())))
    names = {thing.name for thing in scene.things}
    absent = str(rng.choice(sorted(SPLITS["pretrain"].concepts - names)))
    if task == "ocr_vqa" and not words:
        return None
    kinds: dict[str, list[Question]] = {}
    for question in questions(scene, task, (absent,), generic=True):
        kinds.setdefault(question.kind, []).append(question)
    if not kinds:
        return None
    of_kind = kinds[str(rng.choice(sorted(kinds)))]
    question = of_kind[int(rng.integers(len(of_kind)))]
    wordings = question.wordings("all")
    wording = wordings[int(rng.integers(len(wordings)))]
    codec, frame = location_tokens(NUM_BINS), whole(SIZE, SIZE)
    boxes = [codec.encode([box], frame) for box in question.boxes]
    answer = [*boxes, *question.answers][0]
    # "where is the cat?" has two answers: without the prefix both are right, and both are seen
    return Asked(
        task=task,
        prompt=prompt(question, wording, words, bool(rng.random() < 0.7)),
        answer=" " + answer,
        name=dict(question.slots).get("name"),
        asks_where=question.kind in ("box", "place"),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """Several questions about one picture, side by side after its tokens."""

    ids: list[int]
    labels: list[int]
    segments: list[int]  # which question each token belongs to
    positions: list[int]
    weights: list[float]  # 1 / answer tokens: every question counts the same
    tasks: list[int]
    names: list[int]  # LABELS' number at the token that names the thing in question, else -1
    places: list[int]  # the same, where the next token is of the answer that says where it is


class Packer:
    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.encode = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, scene: Scene, words: str | None, rng: np.random.Generator, count: int) -> Row:
        row = Row(
            ids=[], labels=[], segments=[], positions=[], weights=[], tasks=[], names=[], places=[]
        )
        for segment in range(count):
            asked = ask(scene, words, rng)
            if asked is None:
                continue
            question, answer = self.encode(asked.prompt), self.encode(asked.answer)
            answer = [*answer, self.tokenizer.eos_token_id]
            row.ids.extend([*question, *answer])
            row.labels.extend([-100] * len(question) + answer)
            row.segments.extend([segment] * (len(question) + len(answer)))
            row.positions.extend(range(len(question) + len(answer)))
            row.weights.extend([1 / len(answer)] * (len(question) + len(answer)))
            row.names.extend(self._where_named(question, asked.name) + [-1] * len(answer))
            where = LABELS.index(asked.name) if asked.name and asked.asks_where else -1
            row.places.extend([-1] * (len(question) - 1) + [where] * len(answer) + [-1])
            row.tasks.extend([TASKS.index(asked.task)] * (len(question) + len(answer)))
        return row

    def _where_named(self, question: list[int], name: str | None) -> list[int]:
        marks = [-1] * len(question)
        if name is not None:
            marks[question.index(self.encode(f" {name}")[0])] = LABELS.index(name)
        return marks


def pad(rows: list[Row], name: str, value: float, dtype: torch.dtype) -> Tensor:
    width = max(len(row.ids) for row in rows)
    values = [getattr(row, name) + [value] * (width - len(row.ids)) for row in rows]
    return torch.tensor(values, dtype=dtype)


def block_mask(segments: Tensor, prefix: int) -> Tensor:
    """[batch, 1, seq, seq] 0 where a token may look, the picture and its own question before it, else -inf."""
    picture = torch.full((segments.shape[0], prefix), -1, device=segments.device)
    owner = torch.cat([picture, segments], 1)
    same = (owner[:, :, None] == owner[:, None, :]) | (owner == -1)[:, None, :]
    causal = torch.ones(
        owner.shape[1], owner.shape[1], dtype=torch.bool, device=owner.device
    ).tril()
    return torch.where(same & causal, 0.0, -torch.inf)[:, None]


def alignment_loss(model: Any, pictures: Tensor, names: Tensor) -> Tensor:
    """Cross-entropy of projected patches, read as hidden states, with the first token of their names."""
    logits = model.lm_head(model.model.language_model.norm(pictures.float()))
    return F.cross_entropy(logits.flatten(0, 1), names.flatten())


def pointing_loss(attention: Tensor, named: Tensor, shown: Tensor) -> Tensor:
    """-log of the attention paid to the patches that show what is named, or to the first token where none does.

    attention [batch, heads, text, prefix], named [batch, text] labels or -1, shown [batch, patches] labels.
    """
    row, place = (named >= 0).nonzero(as_tuple=True)
    target = shown[row] == named[row, place][:, None]
    target = torch.cat([~target.any(1, keepdim=True), target], 1)
    paid = attention[row, :, place]  # [names, heads, prefix]
    return -(paid * target[:, None]).sum(-1).clamp(min=1e-6).log().mean()


def answer_questions(
    model: Any, packer: Packer, world: World, words: list[str | None], features: Tensor, args
) -> None:
    """Stage 3: projector and language model on cached features, answers only."""
    model.set_attn_implementation("eager")  # shows its attention, and is no slower on a CPU
    language, projector = model.model.language_model, model.model.multi_modal_projector
    parameters = [*language.parameters(), *projector.parameters()]
    rng = np.random.default_rng(args.seed)
    names = torch.tensor([packer.encode(f" {name}")[0] for name in LABELS], device=args.device)
    read = torch.tensor([i for i, found in enumerate(words) if found])
    begin = torch.tensor([[packer.tokenizer.bos_token_id]], device=args.device)
    number = 0
    for chosen, take in _steps(
        parameters, args.steps, len(world.scenes), 32, 1.5e-3, args, "language"
    ):
        few = int(args.read_share * len(chosen))  # scenes with words are rare, and copying is hard
        chosen[:few] = read[torch.from_numpy(rng.integers(len(read), size=few))]
        rows = [packer.row(world.scenes[i], words[i], rng, args.questions) for i in chosen.tolist()]
        ids, labels = pad(rows, "ids", 0, torch.long), pad(rows, "labels", -100, torch.long)
        segments, positions = (
            pad(rows, "segments", -2, torch.long),
            pad(rows, "positions", 0, torch.long),
        )
        weights, tasks = pad(rows, "weights", 0.0, torch.float), pad(rows, "tasks", -1, torch.long)
        embed = language.get_input_embeddings()
        prefix = NUM_PATCHES + 1
        before = torch.arange(prefix).expand(len(rows), -1)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            pictures = projector(features[chosen].to(args.device).float())
            start = embed(begin.expand(len(rows), 1)).to(pictures.dtype)
            text = embed(ids.to(args.device)).to(pictures.dtype)
            out = language(
                inputs_embeds=torch.cat([start, pictures, text], 1),
                attention_mask=block_mask(segments.to(args.device), prefix),
                position_ids=torch.cat([before, positions + prefix], 1).to(args.device),
                use_cache=False,
                output_attentions=True,
            )
            hidden = out.last_hidden_state[:, prefix:]
            supervised = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][supervised.to(args.device)])
        target = labels[:, 1:][supervised].to(args.device)
        weight = weights[:, 1:][supervised].to(args.device)
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        answered = (losses * weight).sum() / weight.sum()
        aligned = alignment_loss(model, pictures, names[world.labels[chosen].to(args.device)])
        looks = [
            pointing_loss(
                out.attentions[layer][:, :POINTING_HEADS, prefix:, :prefix].float(),
                pad(rows, tokens, -1, torch.long).to(args.device),
                world.labels[chosen].to(args.device),
            )
            for tokens, layer in POINTING.items()
        ]
        pointed = torch.stack(looks).sum()
        loss = answered + args.align * aligned + args.point * pointed
        asked = tasks[:, 1:][supervised]
        shown = {"align": aligned.item(), "point": pointed.item(), "answers": answered.item()}
        take(loss, **shown, **{
            task: losses[asked == i].mean().item() for i, task in enumerate(TASKS)
        })  # fmt: skip
        if (number := number + 1) % 200 == 0:
            model.save_pretrained(args.out)


def _steps(parameters, total, rows, batch, peak, args, name) -> Iterator[tuple[Tensor, Take]]:
    """Shuffled batches of row numbers, each with a function that takes the step on their loss."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total, pct_start=0.05)
    order = torch.empty(0, dtype=torch.long)
    began, means = time.time(), dict[str, float]()
    for number in _track(range(total), name):
        if len(order) < batch:
            order = torch.randperm(rows, generator=generator)
        chosen, order = order[:batch], order[batch:]

        def take(loss: Tensor, *, number: int = number, **shown: float) -> None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            means.update({k: 0.98 * means.get(k, v) + 0.02 * v for k, v in shown.items() if v == v})
            if number % 50 == 0 or number == total - 1:
                row = {"stage": name, "step": number, "seconds": round(time.time() - began)}
                print(json.dumps(row | {k: round(v, 3) for k, v in means.items()}), flush=True)

        yield chosen, take


def _track(sequence, name: str):
    columns = (TextColumn(name), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        yield from bar.track(sequence)


def corpus(seed: int) -> list[str]:
    """Texts of some scenes for the tokenizer; signs' words are left out, so that they stay spelled."""
    rng = np.random.default_rng(seed)
    texts = []
    for index in range(2000):
        scene = render_scene("pretrain", index, seed)[1]
        for _ in range(4):
            if asked := ask(scene, None, rng):
                texts.append(asked.prompt + asked.answer)
    return [*texts, *(f"[{task}] \nocr:\nanswer:" for task in TASKS for _ in range(50))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for model, processor and card"
    )
    parser.add_argument(
        "--ocr", type=Path, required=True, help="OCR cache of the pretraining scenes"
    )
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--tower-steps", type=int, default=1500, help="of 64 scenes")
    parser.add_argument("--steps", type=int, default=2500, help="of 32 scenes")
    parser.add_argument("--questions", type=int, default=6, help="about each scene of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--align", type=float, default=0.5, help="weight of patches like words")
    parser.add_argument(
        "--point", type=float, default=0.4, help="weight of names that find patches"
    )
    parser.add_argument("--read-share", type=float, default=0.35, help="of rows with a sign's word")
    parser.add_argument(
        "--mixture", nargs="*", default=[], metavar="TASK=WEIGHT", help=str(MIXTURE)
    )
    parser.add_argument("--start", type=Path, help="base to go on from, its tower as it is")
    return parser.parse_args()


def begin_or_go_on(args: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, Any]:
    if args.start:
        model = LlavaForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        return model.to(args.device), AutoProcessor.from_pretrained(args.start)
    tokenizer = build_tokenizer(corpus(args.seed))
    return build_model(tokenizer).to(args.device), build_processor(tokenizer)


def main() -> None:
    args = arguments()
    began = time.time()
    torch.manual_seed(args.seed)
    MIXTURE.update({task: float(weight) for task, weight in (m.split("=") for m in args.mixture)})
    model, processor = begin_or_go_on(args)
    tokenizer = processor.tokenizer
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} parameters, {len(tokenizer)} tokens", flush=True)
    world = draw_world(processor, args.scenes, args.seed)
    tower = model.model.vision_tower
    card = {"parameters": total, "seed": args.seed, "scenes": args.scenes}
    if not args.start:
        card["foreground_patches_right"] = round(name_patches(tower, world, args), 3)
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    features = encode_scenes(tower, world, args.device)
    words = read_words(world, args.ocr)
    print(f"{len(words)} scenes, {sum(w is not None for w in words)} read", flush=True)
    answer_questions(model, Packer(tokenizer), world, words, features, args)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    card |= {
        name: getattr(args, name) for name in ("tower_steps", "steps", "questions", "align", "point", "read_share")
    }  # fmt: skip
    card |= {"start": str(args.start) if args.start else None, "mixture": MIXTURE, "bf16": args.bf16,
             "minutes": round((time.time() - began) / 60, 1)}  # fmt: skip
    (args.out / "recipe.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
