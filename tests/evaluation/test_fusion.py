"""eval.gates=with:RUN: two runs answer together, whatever their tokens are."""

import json
from dataclasses import replace

import pytest
import torch

from moa.checkpoint import load_model
from moa.evaluation.fusion import STEPS, nearest, relative
from moa.evaluation.predict import prompt_collator, respond
from moa.evaluation.settings import partner_of, variant_of, with_eval
from moa.evaluation.sources import open_sources
from moa.sections import EvalConfig
from tests.evaluation.test_eval import eval_script, make_run, refused
from tests.support import tiny


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_token_is_shares_of_anchors_which_no_frame_of_the_embeddings_changes():
    table, anchors = random(30, 8), torch.arange(3, 20)
    shares = relative(table, anchors)
    torch.testing.assert_close(shares.sum(1), torch.ones(30))
    assert shares[3:20].argmax(1).tolist() == list(range(17))
    turned = table @ torch.linalg.qr(random(8, 8, seed=1)).Q * 3
    torch.testing.assert_close(relative(turned, anchors), shares, rtol=1e-3, atol=1e-5)


def test_probabilities_stay_where_they_are_wanted_and_come_nearer_elsewhere():
    shares, start = relative(random(30, 8), torch.arange(20)), random(4, 30, seed=1).softmax(-1)
    other = random(4, 30, seed=2).softmax(-1)
    torch.testing.assert_close(nearest(start, shares, start @ shares), start)
    wanted = 0.5 * (start + other) @ shares
    lost = [float((wanted * (wanted / (nearest(start, shares, wanted, n) @ shares)).log()).sum()) for n in range(4)]
    assert lost == sorted(lost, reverse=True) and lost[3] < 0.5 * lost[0]
    found = nearest(start, torch.eye(30), 0.5 * (start + other))
    torch.testing.assert_close(found, 0.5 * (start + other))


def test_a_rule_names_a_run_and_its_weight():
    assert partner_of("with:runs/b") == ("runs/b", 0.5) and partner_of("with:.25*runs/b") == ("runs/b", 0.25)
    assert partner_of("router") is None and partner_of({"vqa": 1.0}) is None
    for rule in ("with:0.6*runs/b", "with:0*runs/b"):
        with pytest.raises(ValueError, match="above 0 and at most 0.5; evaluate the run that weighs more"):
            partner_of(rule)
    assert variant_of(replace(EvalConfig(), gates="with:0.3*runs/b")) == "with-0.3-runs-b"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run; the same with other ids of its tokens; one of another base, whose tokens were learned from other texts."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("mine", "moved", "other"):
        (folder / name).mkdir()
    found = {"mine": make_run(folder / "mine")}
    model, processor = tiny.tiny_llava()
    processor.save_pretrained(folder / "moved" / "base")
    file = folder / "moved" / "base" / "tokenizer.json"
    record = json.loads(file.read_text())
    added, words = {row["content"] for row in record["added_tokens"]}, record["model"]["vocab"]
    plain = sorted(number for word, number in words.items() if word not in added)
    moved = dict(zip(plain, reversed(plain), strict=True))
    record["model"]["vocab"] = {word: moved.get(number, number) for word, number in words.items()}
    file.write_text(json.dumps(record))
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[[*moved.values()]] = weight[[*moved]].clone()
    model.save_pretrained(folder / "moved" / "base")
    found["moved"] = make_run(folder / "moved")
    before = tiny.CORPUS
    try:
        tiny.CORPUS = ["which answer is a colour or a number? the red one", "number three", "they read signs"]
        for part in tiny.tiny_llava(seed=1):
            part.save_pretrained(folder / "other" / "base")
        found["other"] = make_run(folder / "other")
    finally:
        tiny.CORPUS = before
    return found


def asked(run):
    model, _, config = load_model(run)
    sources = open_sources(config.data.validation.values(), config.data, None)
    samples = [source[index] for source in sources.values() for index in range(2)]
    return model, prompt_collator(model, config, withhold_task=False), samples


def answers(run, gates, length=6):
    model, collator, samples = asked(run)
    return [r.text for r in respond(model, collator, collator(samples), gates, length, 1)[0]]


@pytest.mark.slow
def test_a_run_with_itself_or_with_other_ids_answers_as_alone(runs):
    alone = answers(runs["mine"], "router")
    assert answers(runs["moved"], "router") == alone
    assert answers(runs["mine"], f"with:{runs['mine']}") == alone
    assert answers(runs["mine"], f"with:{runs['moved']}") == alone
    assert answers(runs["moved"], f"with:{runs['mine']}") == alone
    assert answers(runs["mine"], f"with:0.000001*{runs['other']}") == alone


def likeness(table, anchors):
    """DeePEn's matrix, token by token."""
    rows = []
    for row in table:
        cosines = torch.cosine_similarity(row[None], table[anchors], dim=1)
        rows.append((100 * cosines / cosines.norm().clamp(min=1e-12)).softmax(0))
    return torch.stack(rows)


@torch.no_grad()
def one_by_one(mine, other, length, weight):
    """Each sample by itself, with full forwards of both models and the whole answer for each token."""
    (model, collator, samples), (theirs, their_collator, _) = mine, other
    tokenizers = [c.processor.tokenizer for c in (collator, their_collator)]
    own_words, words = (t.get_vocab() for t in tokenizers)
    stop, their_stop = model.backbone.end, theirs.backbone.end
    shared = [(stop, their_stop), *((n, words[w]) for w, n in own_words.items() if w in words and n != stop)]
    shared = [pair for pair in shared if pair[1] != words["<image>"]]
    tables = [m.backbone.model.get_input_embeddings().weight for m in (model, theirs)]
    own_r, their_r = (likeness(t, [pair[i] for pair in shared]) for i, t in enumerate(tables))
    found = []
    for sample in samples:
        batches, ids = [collator([sample]), their_collator([sample])], []
        while len(ids) < length and (not ids or ids[-1] != stop):
            p, q = (m(b).logits[0, -1].softmax(-1) for m, b in zip((model, theirs), batches, strict=True))
            wanted = (1 - weight) * p @ own_r + weight * q @ their_r
            for _ in range(STEPS):
                p = torch.stack([p[v] * (own_r[v] * wanted / (p @ own_r)).sum() for v in range(len(p))])
            ids.append(int(p.argmax()))
            word = tokenizers[0].convert_ids_to_tokens(ids[-1])
            text, more = word, []
            while text:  # the longest token of the other's first
                part = next(text[:n] for n in range(len(text), 0, -1) if text[:n] in words)
                more, text = [*more, words[part]], text[len(part) :]
            for place, new in enumerate(([ids[-1]], more)):
                old = batches[place]
                batches[place] = replace(
                    old, input_ids=torch.cat([old.input_ids, torch.tensor([new])], 1),
                    attention_mask=torch.cat([old.attention_mask, torch.ones(1, len(new), dtype=torch.long)], 1),
                )  # fmt: skip
        found.append(tokenizers[0].decode(ids, skip_special_tokens=True).strip())
    return found


@pytest.mark.slow
def test_two_tokenizers_answer_as_a_loop_over_tokens_and_anchors_does(runs):
    mine, other = asked(runs["mine"]), asked(runs["other"])
    vocabularies = [set(part[1].processor.tokenizer.get_vocab()) for part in (mine, other)]
    assert len(vocabularies[0] & vocabularies[1]) > 250 and len(vocabularies[0] - vocabularies[1]) > 10
    found = answers(runs["mine"], f"with:{runs['other']}", 4)
    assert found == one_by_one(mine, other, 4, 0.5)
    assert found != answers(runs["mine"], "router", 4)


@pytest.mark.slow
def test_the_evaluation_has_both_in_one_table_and_refuses_what_it_cannot_fuse(runs, capsys, tmp_path):
    rule, common = f"with:{runs['other']}", ["progress=false", "eval.only=[vqa]", "eval.max_new_tokens=3"]
    eval_script.main([f"run={runs['mine']}", *common, f"eval.compare=['{rule}']", "eval.num_images=0"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "run: router" in printed and "run: with:" in printed
    folder = runs["mine"] / "eval" / variant_of(with_eval(load_model(runs["mine"])[2], gates=rule).eval)
    settings = json.loads((folder / "vqa.json").read_text())["settings"]
    assert settings["gates"] == rule and len(settings["other"]) == 32
    for argument, message in (
        (f"eval.gates=with:{tmp_path}/none", "is no folder of a run"),
        (f"eval.gates=with:{tmp_path}", "neither a run with checkpoints/last nor a step folder"),
        (f"eval.gates=with:0.9*{runs['other']}", "at most 0.5"),
    ):
        assert message in refused(capsys, f"run={runs['mine']}", *common, argument)
    beams = [f"eval.gates={rule}", "eval.num_beams=2"]
    assert "num_beams: 1 with gates=with:" in refused(capsys, f"run={runs['mine']}", *common, *beams)
