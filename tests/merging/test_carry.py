"""A LoRA carried to another base: the identity where that is the same, exact where it is in a rotated frame."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from moa.merging.align.carry import activation_maps, frame_maps
from scripts import transplant as script
from tests.merging.test_transplant import logits, refused, world  # noqa: F401
from tests.support.tiny import tiny_llava

READS, WRITES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def rotation(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(maps, update, expected):
    moved, error = maps.carry(update)
    assert error < 1e-9
    for own, wanted in zip(moved, expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_frames_are_the_identity_for_one_base_and_exact_for_a_side_that_is_rotated():
    weight, turn = random(12, 8), rotation(8)
    a, b = random(2, 8, seed=1), random(12, 2, seed=2)
    check(frame_maps(weight, weight), (a, b), (a, b))
    check(frame_maps(weight, weight @ turn.T), (a, b), (a @ turn.T, b))
    check(frame_maps(weight.T, turn @ weight.T), (b.T, a.T), (b.T, turn @ a.T))


def test_frames_of_bases_with_nothing_in_common_and_directions_they_lack_are_errors():
    weight, update = random(12, 8), (random(2, 8, seed=1), random(12, 2, seed=2))
    assert frame_maps(weight, random(12, 8, seed=3)).error > 0.7
    narrow = weight[:4]  # reads 8 inputs in 4 directions, so that half of a random update's have no counterpart
    maps = frame_maps(narrow, narrow @ rotation(8).T)
    assert maps.error < 1e-9 and 0.2 < maps.carry((update[0], update[1][:4]))[1] < 0.8
    with pytest.raises(ValueError, match=r"is \[12, 8\] in one base and \[10, 6\] in the other; frames need one side"):
        frame_maps(weight, random(10, 6))


class Reader(nn.Module):
    """Tokens, one layer that reads them, one that writes."""

    def __init__(self, embedding, up, down):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding)
        self.up, self.down = (nn.Linear(*w.shape[::-1], bias=False, dtype=w.dtype) for w in (up, down))
        for layer, weight in ((self.up, up), (self.down, down)):
            layer.weight.data = weight

    def forward(self, input_ids, use_cache):
        return self.down(self.up(self.embedding(input_ids)).relu())


def test_activations_are_the_identity_for_one_base_and_exact_for_a_rotated_or_wider_one():
    embedding, up, down = random(40, 8), random(12, 8, seed=1), random(8, 12, seed=2)
    rows = [torch.randint(0, 40, (1, 30), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    texts = [((ids, [*range(30)]), (ids, [*range(30)])) for ids in rows]
    shapes, base = {"up": (12, 8), "down": (8, 12)}, Reader(embedding, up, down)
    read, write = (random(2, 8, seed=3), random(12, 2, seed=4)), (random(2, 12, seed=5), random(8, 2, seed=6))
    wide = rotation(10)[:, :8]  # a base of width 10 that does the same in 8 directions
    for turn in (torch.eye(8, dtype=torch.float64), rotation(8), wide):
        other = Reader(embedding @ turn.T, up @ turn.T, turn @ down)
        found = dict(activation_maps(base, other, shapes, texts))
        check(found["up"], read, (read[0] @ turn.T, read[1]))
        check(found["down"], write, (write[0], turn @ write[1]))
    other = Reader(random(40, 8, seed=7), random(12, 8, seed=8), random(8, 12, seed=9))
    assert all(maps.error > 0.5 for maps in dict(activation_maps(base, other, shapes, texts)).values())


def rotate(vlm, turn):
    """The language model in another frame of its residual stream: the same answers to text."""
    turn = turn.float()
    with torch.no_grad():
        for name, module in vlm.named_modules():
            if "language_model" in name and name.endswith(READS) or name == "lm_head":
                module.weight.copy_(module.weight @ turn.T)
            elif "language_model" in name and name.endswith(WRITES):
                module.weight.copy_(turn @ module.weight)
            elif name.endswith("embed_tokens"):
                module.weight.copy_(module.weight @ turn.T)
    return vlm


@pytest.mark.slow
def test_a_text_lora_answers_in_a_rotated_base_as_in_its_own(world, tmp_path, capsys):  # noqa: F811
    vlm, processor = tiny_llava()
    text = LlamaForCausalLM.from_pretrained(world / "text")
    rows = text.config.vocab_size
    expected = logits(PeftModel.from_pretrained(text, world / "lora").eval(), rows)
    rotate(vlm, rotation(32)).save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    words = [bytes(row).decode("latin-1") for row in torch.randint(33, 126, (24, 40)).tolist()]
    (tmp_path / "texts.txt").write_text("\n".join(words))
    texts = f"texts={tmp_path}/texts.txt"
    common = [f"adapter={world}/lora", f"text={world}/text", "verify=false"]
    for carry in (["carry=activations", texts], ["carry=frames"]):
        out = tmp_path / carry[0]
        script.main([*common, *carry, f"vlm={tmp_path}/vlm", f"out={out}"])
        assert "mean error 0.000" in capsys.readouterr().out
        found = logits(PeftModel.from_pretrained(vlm, out).eval(), rows)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        vlm, _ = tiny_llava()
        rotate(vlm, rotation(32))
    other, _ = tiny_llava(seed=5)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    for carry in (["carry=activations", texts], ["carry=frames"]):
        line = refused(capsys, *common, *carry, f"vlm={tmp_path}/other", f"out={tmp_path}/none")
        assert "above max_error=0.5: the two bases have too little in common" in line
    assert not (tmp_path / "none").exists()
    cases = (
        (["carry=activations"], "texts: and carry=activations need each other"),
        (["carry=frames", texts], "texts: and carry=activations need each other"),
        (["carry=frames", f"model={world}/tuned"], "carry: is of an adapter"),
        (["max_error=0.1"], "max_error: has no effect without carry"),
    )
    for arguments, message in cases:
        assert message in refused(capsys, f"vlm={world}/vlm", f"out={tmp_path}/none", *arguments), message
