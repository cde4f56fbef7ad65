"""Every architecture of the family, tiny and random: its parts, and the contracts that all keep.

The samples differ in the size of their pictures, and so in their numbers of tiles and tokens; one
has no picture, where the architecture allows that.
"""

import dataclasses
import json
from functools import cache
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn

import eval as eval_script
from data.batch import Batch
from data.boxes import CODECS
from data.collate import ChatCollator
from data.config import PromptConfig
from data.sample import OcrWord, Sample, Turn, placed
from moa.backbones.families import FAMILIES
from moa.backbones.llava import Backbone, load_backbone
from moa.checkpoint import load_model, step_folder
from moa.evaluation.report import seen_by_tower
from moa.experts.bank import ExpertBank
from moa.loaded import load
from moa.merging.adapters import experts_of_bank
from moa.merging.export import verify as verifying
from moa.merging.export.export import export_adapter, export_checkpoint
from moa.merging.export.verify import probe_inputs, probe_of_run
from moa.merging.merge import merge
from moa.model import LanguageMixture, MixtureModel
from moa.parts import PARTS
from moa.playground.desk import Desk
from moa.routing.router import Router
from moa.training.setup import make_accelerator, open_run
from tests.support.families import NAMES, tiny_family
from tests.support.peft import outputs_here
from tests.support.tiny import random_image
from tests.support.toy import toy_config, write_rows
from train import train

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
each_family = pytest.mark.parametrize("name", NAMES)


def samples_for(name: str) -> list[Sample]:
    """Three pictures of unlike shape, and a sample of text alone where there may be one."""
    images = [random_image(0, 40, 30), random_image(1, 70, 24), random_image(2, 24, 60), None]
    count = 4 if FAMILIES[name].text_only else 3
    word = OcrWord(text="stop", box=(1, 1, 20, 9), confidence=0.9)
    return [
        Sample(
            id=str(i),
            image_id=str(i),
            image=images[i],
            question=("what is it?", "where is the dog", "read", "a cat is what, in a word?")[i],
            answers=(("red", "a dog", "no", "an animal")[i],),
            task="vqa" if i % 2 else "caption",
            source="toy",
            ocr=(word,) if i == 1 else (),
        )
        for i in range(count)
    ]


def batch_of(backbone: Backbone, samples: list[Sample], **changes: Any) -> Batch:
    return ChatCollator(
        processor=backbone.processor,
        tasks=["vqa", "caption"],
        experts=["one", "two"],
        codec=CODECS["location_tokens"],
        **changes,
    )(samples)


@cache
def mixture(name: str, *, filled: bool = True) -> MixtureModel:
    """Two experts on every linear layer that is used, but the output layer, and a router."""
    backbone = tiny_family(name)
    bank = ExpertBank.attach(
        backbone.model,
        [r"model\..*"],
        exclude=backbone.unused_sites(),
        unused=backbone.unused_sites(),
        stream_of=backbone.stream_of,
    )
    bank.add("one", rank=1, alpha=2)
    bank.add("two", rank=2, alpha=2)
    generator = torch.Generator().manual_seed(1)
    for parameter in bank.parameters() if filled else ():
        parameter.data.normal_(std=0.2, generator=generator)
    torch.manual_seed(0)
    router = Router(experts=2, sites=len(bank.sites), dims=backbone.dims, num_tasks=2, hidden=8)
    nn.init.normal_(router.head[-1].weight)
    return LanguageMixture(backbone, bank, router).eval()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_every_row_of_the_table_is_tried_here():
    assert set(NAMES) == set(FAMILIES)


def test_every_convention_for_boxes_is_one_that_prompts_can_use():
    assert {family.box_codec for family in FAMILIES.values()} <= {None, *CODECS}


@each_family
def test_the_parts_in_a_row_are_the_model_that_transformers_runs(name):
    backbone, samples = tiny_family(name), samples_for(name)[:3]
    batch = batch_of(backbone, samples, for_generation=True, settings=PromptConfig(task_in_prompt=False))
    questions = [sample.question + "\nReference OCR token: stop" * (i == 1)
                 for i, sample in enumerate(samples)]  # fmt: skip
    native = probe_inputs(backbone.processor, [s.image for s in samples], questions)
    assert batch.input_ids.equal(native["input_ids"])
    ours = backbone.logits(backbone.hidden_states(batch, backbone.features(batch)))
    whole = backbone.model(**native).logits
    mask = batch.attention_mask.bool()
    close(ours[mask], whole[mask])
    look = backbone.look(batch)
    assert look.tokens.shape[-1] == backbone.dims["image"]
    assert look.owner.unique().tolist() == [0, 1, 2]


@each_family
def test_the_unused_sites_are_those_whose_weights_get_no_gradient(name):
    backbone = tiny_family(name)
    backbone.model.requires_grad_(True)
    batch = batch_of(backbone, samples_for(name))
    backbone.hidden_states(batch, backbone.features(batch)).square().sum().backward()
    without = {
        site
        for site, module in backbone.model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear) and module.weight.grad is None
    }
    assert set(backbone.unused_sites()) == without


@each_family
def test_fresh_experts_change_no_bit_and_experts_off_are_the_backbone(name):
    fresh, filled = mixture(name, filled=False), mixture(name)
    batch = batch_of(fresh.backbone, samples_for(name))
    plain = tiny_family(name)
    with torch.no_grad():
        expected = plain.hidden_states(batch, plain.features(batch))
        with filled.bank.context.disabled():
            off = filled.backbone.hidden_states(batch, filled.backbone.features(batch))
        assert off.equal(expected)
        gates = torch.tensor([0.3, 2.0]).expand(len(batch), 2)
        with fresh.bank.context.disabled():
            before = fresh(batch).loss_per_sample
        assert fresh(batch).loss_per_sample.equal(before)
        assert fresh(batch, gates).loss_per_sample.equal(before)
        assert not torch.allclose(filled(batch, gates).loss_per_sample, before, rtol=1e-3)


@pytest.mark.slow
@each_family
@torch.no_grad()
def test_gates_are_a_samples_own_in_any_batch_and_know_no_answer(name):
    model, samples = mixture(name), samples_for(name)
    batch = batch_of(model.backbone, samples)
    whole = model(batch)
    order = [2, 0, 1, 3][: len(samples)]
    turned = model(batch_of(model.backbone, [samples[i] for i in order]))
    close(turned.gates, whole.gates[order])
    close(turned.loss_per_sample, whole.loss_per_sample[order])
    for i, sample in enumerate(samples):  # alone there is no padding, of tokens or of tiles
        alone = model(batch_of(model.backbone, [sample]))
        close(alone.gates, whole.gates[i : i + 1])
        close(alone.loss_per_sample, whole.loss_per_sample[i : i + 1])
    said = [dataclasses.replace(s, answers=("something else altogether",)) for s in samples]
    close(model(batch_of(model.backbone, said)).gates, whole.gates)
    prompts = batch_of(model.backbone, samples, for_generation=True)  # padded on the left
    close(model.compute_gates(prompts).gates, whole.gates)


@each_family
@torch.no_grad()
def test_packed_rows_equal_a_row_per_sample_or_are_refused(name):
    model, samples = mixture(name), samples_for(name)
    packed = batch_of(model.backbone, samples, pack_length=400)
    assert len(packed.input_ids) < len(samples)
    if FAMILIES[name].token_types is not None:
        with pytest.raises(ValueError, match=f"pack_length: {name} has positions or masks"):
            model(packed)
        return
    whole = model(batch_of(model.backbone, samples))
    close(model(packed).gates, whole.gates)
    close(model(packed).loss_per_sample, whole.loss_per_sample)


@each_family
@torch.no_grad()
def test_a_picture_changes_the_gates_of_its_sample_alone(name):
    model, samples = mixture(name), samples_for(name)
    before = model.compute_gates(batch_of(model.backbone, samples)).gates
    samples[1] = dataclasses.replace(samples[1], image=random_image(9, 24, 70))
    after = model.compute_gates(batch_of(model.backbone, samples)).gates
    assert not torch.allclose(after[1], before[1], atol=1e-4)
    others = [i for i in range(len(samples)) if i != 1]
    close(after[others], before[others])


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3"])
@torch.no_grad()
def test_routing_each_token_keeps_to_the_samples_whatever_a_row_of_the_tower_is(name):
    mixture.cache_clear()
    backbone, bank = mixture(name).backbone, mixture(name).bank
    bank.add_token_routers(std=1.0)
    model, samples = LanguageMixture(backbone, bank, granularity="token").eval(), samples_for(name)
    whole = model(batch_of(backbone, samples))
    for i, sample in enumerate(samples):
        alone = model(batch_of(backbone, [sample]))
        close(alone.gates, whole.gates[i : i + 1])
        close(alone.loss_per_sample, whole.loss_per_sample[i : i + 1])
    mixture.cache_clear()


@pytest.mark.slow
@each_family
def test_gradients_reach_experts_and_router_alone_and_survive_checkpointing(name):
    mixture.cache_clear()
    model = mixture(name).train()
    model.router.eval()  # its dropout of evidence would draw other numbers
    batch = batch_of(model.backbone, samples_for(name))

    def gradients() -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        model(batch).loss_per_sample.sum().backward()
        return {n: p.grad if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, grad in plain.items() if grad is not None} == trained
    assert all("lora_" in n or "router." in n for n in trained)
    for site in model.bank.sites:
        assert any(plain[n].abs().sum() > 0 for n in trained if n.startswith(f"model.{site}.")), site
    model.enable_gradient_checkpointing()
    for parameter, grad in gradients().items():
        if grad is not None:
            close(grad, plain[parameter])
    mixture.cache_clear()


@pytest.mark.slow
@each_family
@torch.no_grad()
def test_cached_decoding_equals_uncached_and_beams_keep_their_samples_gates(name):
    model, samples = mixture(name), samples_for(name)
    batch = batch_of(model.backbone, samples, for_generation=True)
    new = model.generate(batch, **GREEDY)
    taught = dataclasses.replace(  # one uncached forward over what was generated
        batch,
        input_ids=torch.cat([batch.input_ids, new], 1),
        attention_mask=torch.cat([batch.attention_mask, torch.ones_like(new)], 1),
        labels=torch.cat([torch.full_like(batch.input_ids, -100), new], 1),
    )
    assert model(taught).logits.argmax(-1).equal(new)
    gates = torch.eye(2)[[0, 1, 0, 1]][: len(samples)] * 3
    beams = model.generate(batch, gates, **GREEDY, num_beams=2)
    for i, sample in enumerate(samples):
        one = batch_of(model.backbone, [sample], for_generation=True)
        assert model.generate(one, gates[i : i + 1], **GREEDY, num_beams=2).equal(beams[i : i + 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if FAMILIES[n].text_only])
def test_a_batch_of_text_alone_is_answered_and_every_expert_takes_part(name):
    mixture.cache_clear()
    model, text = mixture(name), samples_for(name)[3]
    batch = batch_of(model.backbone, [text, text])
    assert batch.is_blank
    out = model(batch)
    mixed = model(batch_of(model.backbone, [samples_for(name)[0], text]))
    close(out.loss_per_sample, mixed.loss_per_sample[1].expand(2))
    out.loss_per_sample.sum().backward()
    assert all(p.grad is not None for p in model.bank.parameters())
    prompts = batch_of(model.backbone, [text], for_generation=True)
    assert model.generate(prompts, **GREEDY).shape == (1, 4)
    mixture.cache_clear()


def conversation_of_three(name: str) -> list[Sample]:
    """Two pictures amid the first question and one amid the second; a sample of one picture, and of none."""
    one, two, _, text = samples_for(name)
    first, *more = (random_image(10 + i, 40 + 9 * i, 30 + 20 * (i == 1)) for i in range(3))
    turn = Turn(question=placed("where is <image>, then"), answer="a dog")
    asked: dict[str, Any] = {"question": placed("is <image> like <image> now?"), "turns": (turn,)}
    return [dataclasses.replace(one, image=first, more_images=tuple(more), **asked), two, text]


each_of_several = pytest.mark.parametrize("name", [n for n in NAMES if FAMILIES[n].several_images])


@each_of_several
def test_images_stand_where_they_do_in_the_text_as_the_processor_alone_reads_it(name):
    backbone = mixture(name).backbone
    processor, samples = backbone.processor, conversation_of_three(name)

    def said(role: str, *parts: str) -> dict[str, Any]:
        content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
        return {"role": role, "content": content}

    chat = [said("user", "[caption] is ", "", " like ", "", " now?"), said("assistant", "red"),
            said("user", "where is ", "", ", then"), said("assistant", "a dog")]  # fmt: skip
    whole = processor(text=[processor.apply_chat_template(chat)], images=[[*samples[0].images]])["input_ids"][0]
    batch = batch_of(backbone, samples)
    found = batch.input_ids[0][batch.attention_mask[0].bool()].tolist()
    assert found == list(whole)[: len(found)] and len(whole) - len(found) <= 1  # a line break behind the end token
    learned = batch.input_ids[0][batch.labels[0] != -100] if batch.labels is not None else []
    assert processor.tokenizer.decode(learned) == "red</s>a dog</s>"
    assert batch.image_index.tolist() == [0, 0, 0, 1] and batch.image_mask.tolist() == [True, True, False]
    prompts = batch_of(backbone, samples, for_generation=True)  # the third picture comes behind the first answer
    assert prompts.image_index.tolist() == [0, 0, 1]


@each_of_several
@torch.no_grad()
def test_several_images_are_their_samples_own_in_any_batch(name):
    model, samples = mixture(name), conversation_of_three(name)
    whole = model(batch_of(model.backbone, samples))
    turned = model(batch_of(model.backbone, samples[::-1]))
    close(turned.gates, whole.gates.flip(0))
    close(turned.loss_per_sample, whole.loss_per_sample.flip(0))
    alone = model(batch_of(model.backbone, samples[:1]))
    close(alone.gates, whole.gates[:1])
    close(alone.loss_per_sample, whole.loss_per_sample[:1])
    second, third = samples[0].more_images
    other = [dataclasses.replace(samples[0], more_images=(second.rotate(180), third)), *samples[1:]]
    gates = model.compute_gates(batch_of(model.backbone, other)).gates
    assert not torch.allclose(gates[0], whole.gates[0])  # the router sees every image
    close(gates[1:], whole.gates[1:])
    if FAMILIES[name].token_types is None:
        packed = model(batch_of(model.backbone, samples, pack_length=400))
        close(packed.gates, whole.gates)
        close(packed.loss_per_sample, whole.loss_per_sample)


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_a_family_of_one_image_refuses_several_with_those_that_take_them(name):
    backbone = tiny_family(name)
    sample = dataclasses.replace(samples_for(name)[0], more_images=(random_image(9),))
    rule = f"source 'toy', sample 0: several images: has 2, and a {name} was trained on one a sample; bases that take"
    with pytest.raises(ValueError, match=f"{rule} several: llava_next, .*gemma3"):
        batch_of(backbone, [sample], one_image=backbone.intake.one_image)


@pytest.fixture
def same_process(monkeypatch):
    monkeypatch.setattr(verifying, "fresh_outputs", outputs_here)


def some_slow(*fast: str) -> Any:
    """Every architecture; those that are not named take part in the slow tests alone."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[] if n in fast else pytest.mark.slow) for n in NAMES]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
@some_slow("llava", "qwen2_5_vl", "idefics3")
def test_a_mixture_exports_to_what_plain_peft_or_transformers_computes(name, kind, tmp_path, same_process):
    model = mixture(name)
    base = tiny_family(name)
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    loaded = load_backbone(str(tmp_path / "base"))
    images = [random_image(0, 40, 30), random_image(1, 70, 24)]
    inputs = probe_inputs(loaded.processor, images, ["what is it?", "where"])
    experts, weights = experts_of_bank(model.bank), {"one": 0.7, "two": 0.5}
    merged = merge(experts, weights=weights)
    gates = {site: torch.tensor([0.7, 0.5]) for site in model.bank.sites}
    verify = verifying.make_verify(
        loaded.model, inputs, experts=experts, base=tmp_path / "base", gates=gates, exact=True,
        stream_of=loaded.stream_of, owners=loaded.owners_of(inputs),
        new_tokens=3,
    )  # fmt: skip
    out = tmp_path / "out"
    if kind == "adapter":
        report = export_adapter(out, merged, experts, base=str(tmp_path / "base"), verify=verify)
    else:
        report = export_checkpoint(out, merged, experts, base=tmp_path / "base", verify=verify)
    found = report["comparisons"]
    assert found["live_mixture"]["max_abs_logit_diff"] < 1e-4
    assert found["live_mixture"]["greedy_token_agreement"] == 1.0
    assert found["base_to_live_mixture"]["max_abs_logit_diff"] > 1e-3


@each_family
def test_a_page_of_samples_shows_what_the_tower_saw_or_the_picture_itself(name):
    picture = samples_for(name)[0].image
    shown = seen_by_tower(picture, tiny_family(name).processor.image_processor)
    cut = FAMILIES[name].rows in ("tiles", "slots", "patches")
    assert shown.size == (picture.size if cut else (28, 28))


@pytest.mark.slow
@each_family
def test_a_run_trains_projector_too_is_saved_reloaded_and_evaluated(name, tmp_path):
    backbone = tiny_family(name)
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.processor.save_pretrained(tmp_path / "base")
    config = toy_config(
        tmp_path,
        model__targets=[r"model\..*"],
        model__exclude=backbone.unused_sites(),
        model__train_projector=True,
        stages={"joint": {"steps": 2}},
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    run, state = open_run(config, make_accelerator(config))
    train(run, state)
    trained, reloaded = run.model.eval(), load_model(config.out)[0]
    batch = batch_of(backbone, samples_for(name))
    with torch.no_grad():
        assert reloaded(batch).loss_per_sample.equal(trained(batch).loss_per_sample)
    moved = PARTS["projector"].state(trained)
    assert moved
    assert not any(t.equal(backbone.model.get_parameter(n)) for n, t in moved.items())
    eval_script.main([f"run={config.out}", "eval.num_images=2", "eval.max_new_tokens=4"])
    assert (tmp_path / "run/pictures").is_dir()


@pytest.mark.slow
def test_a_run_on_several_images_is_trained_evaluated_asked_and_probed(tmp_path):
    backbone = tiny_family("llava_next")  # whose rows are tiles, unequally many of an image
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.processor.save_pretrained(tmp_path / "base")
    config = toy_config(tmp_path, model__targets=[r"model\..*"], model__exclude=backbone.unused_sites(),
                        stages={"joint": {"steps": 2}})  # fmt: skip
    rows = tmp_path / "vqa.jsonl"
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, row in enumerate(made[::2]):
        row |= {"image": [row["image"], "4.png"], "question": ("", "is <image> like <image>?")[number % 2] or "same?"}
        row.pop("ocr", None)
    write_rows(rows, made)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(*open_run(config, make_accelerator(config)))
    eval_script.main([f"run={config.out}", "eval.num_images=0", "eval.max_new_tokens=4", "eval.batch_size=3"])
    asked = [json.loads(line) for line in (tmp_path / "run/eval/vqa.jsonl").read_text().splitlines()]
    assert "is <image> like <image>?" in {row["question"] for row in asked}
    model = load(config.out, device="cpu")
    files = [tmp_path / "0.png", tmp_path / "4.png"]
    answer = model.ask(files, "is <image> like <image>?", "vqa", max_new_tokens=4)
    other = model.ask([files[0]] * 2, "is <image> like <image>?", "vqa", max_new_tokens=4)
    assert answer.gates != other.gates and answer.box is None
    desk = Desk(model=model, folder=tmp_path)
    images = [Image.open(file).convert("RGB") for file in files]
    assert desk.answer(images, "is <image> like <image>?", "vqa", "router").gates == answer.gates
    assert [len(sample.images) for sample in desk.samples()] == [2, 1] and desk.most_images > 1
    with pytest.raises(ValueError, match="image places: 1 times <image> for 2 images"):
        model.ask(files, "is <image> red?", "vqa")
    inputs, owners, routed = probe_of_run(step_folder(config.out), config, 3, 3)
    assert owners["image"].tolist().count(0) > owners["image"].tolist().count(1) and len(routed.tokens) == 3


def test_another_architecture_is_refused_with_the_choices(tmp_path):
    tiny_family("llava").model.config.text_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a llama; choices: llava, llava_next, .*gemma3"):
        load_backbone(str(tmp_path))


def test_a_picture_is_asked_for_where_the_architecture_needs_one():
    backbone = tiny_family("paligemma")
    text = dataclasses.replace(samples_for("paligemma")[0], image=None)
    with pytest.raises(ValueError, match="images"):
        batch_of(backbone, [text])


@pytest.mark.parametrize("name", ["4bit", "8bit"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of machines without CUDA")
def test_a_quantised_base_is_refused_where_it_cannot_run(name, tmp_path):
    tiny_family("llava").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model.quantization: {name} needs a CUDA device"):
        load_backbone(str(tmp_path), quantization=name)
