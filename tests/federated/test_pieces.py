"""Roles cut a mixture's tensors into pieces: each element in exactly one."""

import pytest
import torch

from moa.federated.pieces import Names, Role, join, pieces_of, print_roles
from moa.parts import PARTS
from moa.routing.router import AnchorRouter, Router
from tests.test_model import make_model

NAMES = Names(choices=("vqa", "ocr"), evidence=("image", "ocr"))
OCR = (
    Role(name="ocr", match=["experts:ocr"], clients="has:ocr", elsewhere="frozen"),
    Role(name="router.ocr", match=["router:evidence=ocr", "router:row=ocr"], clients="has:ocr"),
    Role(name="router", match=["router:rest"]),
    Role(name="experts", match=["experts:rest"], clients="owners"),
)
REST = Role(name="rest", match=["rest"])


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    router = Router(experts=2, sites=3, evidence=NAMES.evidence, dims={"image": 5, "text": 6}, hidden=4, per_site=True)
    own = {f"router.{key}": p.detach() for key, p in router.named_parameters()}
    own["router.token_router.q"] = torch.randn(2, 7)
    for name in NAMES.choices:
        own[f"experts.{name}.q.lora_A.weight"] = torch.randn(4, 7)
        own[f"experts.{name}.q.lora_B.weight"] = torch.randn(5, 4)
    return own


def cut(*roles: Role, **more: tuple[int, ...]):
    shapes = {key: tuple(value.shape) for key, value in tensors().items()} | more
    return pieces_of(shapes, roles, NAMES)


def test_each_element_is_in_one_piece_and_pieces_join_to_the_same_tensors():
    own, pieces = tensors(), cut(*OCR)
    count = {key: torch.zeros_like(value) for key, value in own.items()}
    for piece in pieces:
        piece.of(count).add_(1)
        assert piece.of(own).shape == piece.shape
    assert all(bool((value == 1).all()) for value in count.values())
    empty = {key: torch.full_like(value, torch.nan) for key, value in own.items()}
    joined = join(pieces, {piece.name: piece.of(own) for piece in pieces}, empty)
    assert all(torch.equal(joined[key], own[key]) for key in own)


def test_the_ocr_branch_is_encoder_columns_and_rows():
    names = {piece.name for piece in cut(*OCR) if piece.role == "router.ocr"}
    assert {
        "router.encoders.ocr.word.weight",
        "router.head.0.weight[4:8]",
        "router.head.1.weight[:,4:8]",
        "router.head.3.weight[1:2]",
        "router.head.3.bias[1:2]",
        "router.site_offset[:,1:2]",
        "router.token_router.q[1:2]",
    } <= names
    # trained by clients without OCR
    assert "router.missing.ocr" not in names


def test_join_leaves_other_tensors_as_they_are_and_the_given_ones_unchanged():
    own, pieces = tensors(), cut(*OCR)
    before = own["router.head.1.weight"].clone()
    values = {p.name: torch.zeros(p.shape) for p in pieces if p.role == "router.ocr"}
    joined = join(pieces, values, own)
    assert torch.equal(own["router.head.1.weight"], before)
    assert torch.equal(joined["router.head.1.weight"][:, :4], before[:, :4])
    assert not joined["router.head.1.weight"][:, 4:].any()
    assert joined["experts.vqa.q.lora_A.weight"] is own["experts.vqa.q.lora_A.weight"]


@pytest.mark.parametrize("match", ["experts:*.A", "experts:*.ranks=0:2"])
def test_factors_and_ranks_are_roles(match):
    first = Role(name="first", match=[match])
    pieces = [p for p in cut(first, Role(name="other", match=["rest"])) if p.role == "first"]
    names = [p.name for p in pieces if ".vqa." in p.name]
    a, b = "experts.vqa.q.lora_A.weight", "experts.vqa.q.lora_B.weight"
    assert names == ([a] if match.endswith("A") else [f"{a}[0:2]", f"{b}[:,0:2]"])


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (OCR[:2] + OCR[3:], r"router.\S+ is in no role"),
        (
            (*OCR, Role(name="a", match=["experts:ocr.A"])),
            "q.lora_A.weight.* is taken twice, by ocr and a",
        ),
        ((*OCR, Role(name="a", match=["rest"])), r"taken twice, by router and a"),
        ((*OCR, Role(name="a", match=["projector"])), "roles.a.match: projector selects nothing"),
        ((*OCR, Role(name="ocr", match=["projector"])), "two have the same name"),
        ((*OCR[1:], Role(name="x", match=["experts:ocr", "experts:cap"])), "experts:cap selects nothing"),
        ((Role(name="a", match=["router:row=cap"]),), r"router:row=cap' is unknown; choices: .*router:row=vqa"),
        ((Role(name="a", match=["expert:vqa"]),), "must begin with one of"),
        (
            (Role(name="a", match=["experts:*.ranks=0:3", "experts:*.ranks=2:4"]), *OCR[1:3]),
            r"A.weight\[2:3\] is taken",
        ),
        ((Role(name="a", match=["experts:*.ranks=0:3"]), *OCR[1:3]), r"A.weight\[3:4\] is in no role"),
    ],
)
def test_what_is_left_out_taken_twice_or_unknown_is_named(roles, said):
    with pytest.raises(ValueError, match=said):
        cut(*roles)


def test_a_row_is_no_role_where_a_layer_routes_only_some_of_the_experts():
    with pytest.raises(ValueError, match=r"token_router.v routes only some of the experts"):
        cut(*OCR, **{"router.token_router.v": (1, 7)})


def test_columns_and_rows_of_one_tensor_meet():
    names = Names(choices=("vqa", "ocr"), evidence=("image",))
    roles = [Role(name="rows", match=["router:row=ocr"]), Role(name="kind", match=["router:evidence=image"])]
    with pytest.raises(ValueError, match=r"router.image_sums\[1:2\] is taken twice"):
        pieces_of({"router.image_sums": (2, 5)}, [*roles, Role(name="r", match=["rest"])], names)


def test_anchors_are_roles_by_evidence():
    router = AnchorRouter(experts=2, evidence=NAMES.evidence, dims={"image": 5, "text": 6})
    shapes = {f"router.{key}": tuple(b.shape) for key, b in router.named_buffers()}
    roles = [Role(name="a", match=["router:evidence=ocr"]), Role(name="b", match=["router:rest"])]
    pieces = pieces_of(shapes, roles, NAMES)
    assert {p.key for p in pieces if p.role == "a"} == {"router.ocr_sums", "router.ocr_counts"}


@pytest.mark.parametrize("change", [{"clients": "some"}, {"weight": "size"}, {"scope": "x"}])
def test_a_wrong_value_of_a_role_is_named(change):
    with pytest.raises(ValueError, match=rf"^{next(iter(change))}: must be"):
        Role(name="a", match=["rest"], **change)


def test_who_contributes():
    ocr, _, everyone, owned = OCR
    assert ocr.contributes(modalities=["ocr"]) and not ocr.contributes(modalities=["image"], count=5)
    assert everyone.contributes() and owned.contributes(count=1) and not owned.contributes()
    assert not Role(name="k", match=["rest"], keep=True).contributes(count=3)
    assert Role(name="k", match=["rest"], clients="task:count").contributes(tasks=["count"])


def test_the_printed_table_counts_numbers_and_bytes():
    lines = print_roles(cut(*OCR), OCR).splitlines()
    assert lines[1].split()[:3] == ["ocr", "48", "192"] and len(lines) == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top_k", "anchors"])
def test_the_parts_of_a_real_mixture_are_cut_without_a_rest(kind):
    model = make_model(kind)
    assert model.router is not None
    names = Names(choices=tuple(model.bank.names), evidence=tuple(model.router.evidence))
    own = {f"{part}.{key}": v for part in ("experts", "router") for key, v in PARTS[part].parameters(model).items()}
    own |= {f"router.{key}": buffer for key, buffer in model.router.named_buffers()}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    rows = [f"router:row={name}" for name in names.choices]
    by_kind = [Role(name=k, match=[f"router:evidence={k}"]) for k in names.evidence]
    experts = [Role(name=f"experts.{n}", match=[f"experts:{n}.A", f"experts:{n}.B"]) for n in names.choices]
    roles = [*experts, *by_kind]
    if kind == "top_k":
        missing = [f"router:missing={k}" for k in names.evidence]
        roles += [Role(name="rows", match=rows), Role(name="missing", match=missing)]
        left = set(shapes) - {piece.key for piece in pieces_of(shapes, [*roles, REST], names) if piece.role != "rest"}
        assert left == {"router.head.1.bias"}
        roles.append(REST)
    pieces = pieces_of(shapes, roles, names)
    assert sum(piece.numel for piece in pieces) == sum(value.numel() for value in own.values())
