"""From features to scores, with the features of a real tiny CLIP and with ones made by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from moa.evaluation.dual_encoder import classify, clip_scores, retrieve
from moa.metrics.retrieval import clip_score
from tests.benchmarks.test_benchmarks import prediction

CHOICES = ("cat", "dog", "bus")


def samples_of(answers, **changes):
    return [
        replace(prediction("", [answer], image_id=f"{i}").sample, id=f"{i}", **changes)
        for i, answer in enumerate(answers)
    ]


def class_rows(question, choices):
    assert question == "what is this?"
    return torch.eye(3)[[CHOICES.index(name) for name in choices]]


def test_classification_gives_top_1_top_5_and_the_mean_of_the_classes():
    samples = samples_of(["cat", "cat", "cat", "bus"], choices=CHOICES)
    images = torch.tensor([[3.0, 0, 0], [2.0, 1, 0], [1.0, 0, 0], [0.5, 1.0, 0.1]])
    result = classify("pets", samples, images, class_rows, model="by hand")
    _, scores = result.tasks["classification"]
    assert dict(scores) == {
        "top_1": 0.75,
        "top_5": 1.0,
        "mean_per_class": 0.5,  # cat 1, bus 0
    }
    record = result.record()
    assert record["by_tag"] == {
        "class bus": {"value": 0.0, "n": 1},
        "class cat": {"value": 1.0, "n": 3},
    }
    assert [row["prediction"] for row in result.rows()] == ["cat", "cat", "cat", "dog"]
    assert record["settings"] == {"model": "by hand"}


def test_samples_of_one_source_may_choose_from_different_classes():
    samples = samples_of(["dog"], choices=("dog", "bus")) + samples_of(["cat"], choices=CHOICES)
    result = classify("mixed", samples, torch.tensor([[9.0, 1, 0], [1.0, 0, 0]]), class_rows)
    assert result.sample_scores == [1.0, 1.0]  # "cat" is not among the first sample's choices


def test_an_answer_that_is_no_choice_is_named():
    with pytest.raises(ValueError, match=r"pets: sample 0: answers=\('cow',\) is none of its 3"):
        classify("pets", samples_of(["cow"], choices=CHOICES), torch.ones(1, 3), class_rows)


def test_retrieval_asks_both_ways_and_clusters_by_picture():
    pictures = samples_of(["?", "?"])
    pictures = [replace(s, answers=a) for s, a in zip(pictures, [("a", "b", "c"), ("d",)], strict=True)]
    images = torch.tensor([[1.0, 0], [0, 1.0]])
    texts = torch.tensor([[1.0, 0], [0.1, 1.0], [1.0, 0.1], [0, 1.0]])
    result = retrieve("flickr", pictures, images, texts)
    (to_text, found), (to_image, asked) = result.tasks.values()
    assert dict(found)["R@1"] == 1.0 and dict(asked)["R@1"] == 0.75
    assert [p.text for p in to_text] == ["a", "d"] and to_image[1].text == "1"
    assert [p.sample.image_id for p in to_image] == ["0", "0", "0", "1"]
    assert result.record()["num_duplicate_ids"] == 0
    with pytest.raises(ValueError, match="4 captions and 3 text features"):
        retrieve("flickr", pictures, images, texts[:3])


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=32,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=31,
            pad_token_id=1,
            **small,
        ).to_dict(),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **small).to_dict(),
        projection_dim=12,
    )
    return CLIPModel(config).eval()


@torch.no_grad()
def features(clip, count):
    torch.manual_seed(1)
    output = clip(
        pixel_values=torch.randn(count, 3, 8, 8),
        input_ids=torch.cat([torch.randint(2, 31, (2 * count, 6)), torch.full((2 * count, 1), 31)], 1),
        attention_mask=torch.ones(2 * count, 7, dtype=torch.long),
    )
    return output


def test_a_real_clips_ranks_are_those_of_its_own_logits(clip):
    output = features(clip, 5)
    pictures = [replace(s, answers=("x", "y")) for s in samples_of("abcde")]
    result = retrieve("tiny", pictures, output.image_embeds, output.text_embeds)
    best = output.logits_per_image.reshape(5, 5, 2).amax(2)  # of each picture's two captions
    expected = [float(row.argmax() == i) for i, row in enumerate(best)]
    assert result.tasks["image_to_text"][1].values["R@1"] == expected


def test_clip_scores_of_a_real_clip_are_its_cosines(clip):
    output = features(clip, 3)
    images, texts = output.image_embeds, output.text_embeds[:3]
    cosines = (normalize(images, dim=-1) * normalize(texts, dim=-1)).sum(-1)
    scores = clip_scores(images, texts, [texts[i : i + 1] for i in range(3)])
    expected = [2.5 * max(c, 0.0) for c in cosines.tolist()]
    assert scores.values["CLIPScore"] == pytest.approx(expected, abs=1e-6)
    # each caption is its own reference: cosine 1
    own = [2 * s / (s + 1) if s else 0.0 for s in clip_score(images, texts).tolist()]
    assert scores.values["RefCLIPScore"] == pytest.approx(own, abs=1e-6)
