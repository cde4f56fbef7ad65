"""The bank of experts of one model: attach, add, tie, freeze, remove, import and export.

The bank swaps chosen `nn.Linear` modules for `ExpertLinear` ones around them, and `detach` puts them back. An expert is
of one kind, a row of moa/experts/kinds.py, over all sites or a subset.
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moa.experts.attach import choose_layers, linear_layers, wrap_layers, wrap_modules
from moa.experts.context import Decide, GateContext, GateState
from moa.experts.kinds import KINDS
from moa.experts.lora import ExpertLinear
from moa.experts.rank_gates import RankGates
from moa.experts.starts import normal
from moa.experts.ties import FACTORS, Place, Ties, tied_places
from moa.experts.token_routers import LEARNED, TokenSite, leaders, router_shapes
from moa.files.peft import ExpertHeader, fit_to_base, is_zero, keep_sites
from moa.files.targets import ALL_LINEAR, select
from moa.packing import Owners, Segments

EXPERT_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """An expert's kind, what it was made with (for LoRA its usual rank and alpha), and the sites it has."""

    kind: str
    settings: dict[str, Any]
    sites: tuple[str, ...]
    trained: tuple[str, ...] = FACTORS

    @property
    def frozen(self) -> bool:
        return not self.trained


@dataclass(kw_only=True)
class ExpertBank:
    """Owns the sites of one model, in module order, and its experts, in the order they came."""

    sites: dict[str, ExpertLinear]
    context: GateContext
    streams: dict[str, str]  # site -> "text", "image" ...: what its first axis counts
    shapes: dict[str, tuple[int, int]]  # every linear layer of the model -> (out, in)
    unused: frozenset[str]  # those whose output the model never reads
    experts: dict[str, ExpertSpec] = field(default_factory=dict)
    # of top-k that is balanced without a loss: site with a token router -> float32 [choice], whatever the model's dtype
    token_biases: dict[str, Tensor] = field(default_factory=dict)
    num_tasks: int = 0  # of gates of ranks, or routers, by task; 0: there are none

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        targets: Sequence[str],
        *,
        exclude: Sequence[str] = (),
        unused: Collection[str] = (),
        stream_of: Callable[[str], str] = lambda site: "text",
        around: Mapping[str, tuple[str, str]] | None = None,
        kinds: Mapping[str, Sequence[str]] | None = None,
    ) -> "ExpertBank":
        """Wrap the linear layers that the targets name.

        A target is a full module path, a regular expression for the whole path, or `all-linear`. `unused` are
        layers whose output the model never reads, `stream_of` gives what a site's first axis counts: samples
        ("text"), or the rows of another stream, such as images ("image"). `around` are modules that get
        adapters: path -> kind and activation. `kinds`: kind -> those of the targets that have experts of
        another kind than lora. Raises ValueError for a target or an exclusion that matches nothing, for unused
        layers, and for layers whose weight is another layer's too.
        """
        context = GateContext()
        shapes = {name: (m.out_features, m.in_features) for name, m in linear_layers(model).items()}
        chosen = choose_layers(model, targets, exclude, unused)
        if not chosen and not around:
            raise ValueError(f"exclude={list(exclude)} leaves none of targets={list(targets)}")
        sites = wrap_layers(model, chosen, context, kinds or {})
        sites |= wrap_modules(model, around or {}, unused, context)  # after what is inside of them
        return cls(
            sites=sites,
            context=context,
            streams={name: stream_of(name) for name in sites},
            shapes=shapes | {name: sites[name].shape for name in around or {}},
            unused=frozenset(unused),
        )

    def detach(self, model: nn.Module) -> None:
        for name, site in reversed(self.sites.items()):
            model.set_submodule(name, site.base_layer)

    @property
    def names(self) -> list[str]:
        return list(self.experts)

    def add(
        self,
        name: str,
        *,
        kind: str = "lora",
        targets: Sequence[str] | None = None,
        seed: int = 0,
        routed: bool = True,
        **settings: Any,
    ) -> None:
        """A fresh, trainable expert at all sites of its kind or at `targets`; it changes no output yet.

        One that token routers may choose comes before them; another is not `routed`.
        `settings` are those of the kind's fresh start, such as rank and alpha.
        """
        self._check_new(name, routed)
        able = {site: layer for site, layer in self.sites.items() if layer.kind == kind}
        chosen = able if targets is None else select(targets, able, f"{name}.targets")
        self._register(name, kind, KINDS[kind].fresh(chosen, name, seed=seed, **settings))

    def import_expert(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, kind: str = "lora", **options: Any
    ) -> None:
        """A trainable expert from its file, for LoRA a plain PEFT adapter as `moa.files.peft` reads it. Raises
        ValueError for keys that no site consumes, and for shapes of another base."""
        self._check_new(name)
        able = {site: layer for site, layer in self.sites.items() if layer.kind == kind}
        self._register(name, kind, KINDS[kind].load(able, name, tensors, config, **options))

    def fit(self, header: ExpertHeader) -> tuple[ExpertHeader, str | None]:
        """An adapter's header with the bank's own sites alone, as the model spells them; a line on what was dropped.

        Factors at layers that the model never reads, and those whose update is zero, change nothing and are dropped:
        PEFT's `all-linear` and bare names such as `q_proj` bring them along. Raises ValueError for a site that the
        model lacks, has in another shape, or that is not among the targets.
        """
        header = fit_to_base(header, self.shapes)
        outside = [site for site in header.ranks if site not in self.sites]
        idle = [site for site in outside if site in self.unused or is_zero(header, site)]
        if lacking := [site for site in outside if site not in idle]:
            raise ValueError(
                f"{header.path}: {len(lacking)} of its sites are not among model.targets, first {lacking[0]}; name "
                f"them there too, or use model.targets=[{ALL_LINEAR}]"
            )
        for site in header.ranks:
            if site in self.sites and (own := self.sites[site].activation) != (
                found := header.config.get("activation", "")
            ):
                raise ValueError(f"{header.path}: has the activation {found!r} at {site}, and the run has {own!r}")
        if not idle:
            return header, None
        line = f"{header.path}: {len(idle)} sites dropped that change no output, first {idle[0]}"
        return keep_sites(header, [site for site in header.ranks if site not in idle]), line

    def remove(self, name: str) -> None:
        for site_name in self._spec(name).sites:
            self.sites[site_name].remove(name)
        del self.experts[name]
        self.context.state = None  # gates of other experts

    @contextmanager
    def only(self, names: Collection[str]) -> Iterator[None]:
        """Inside, the bank has these experts alone, in their order; the others come back as they were."""
        everyone, held = self.experts, {site: site.remove_all() for site in self.sites.values()}
        try:
            self.experts = {name: spec for name, spec in everyone.items() if name in names}
            for site, own in held.items():
                for expert in filter(self.experts.get, own):
                    site.add(expert, *own[expert])
            self.context.state = None  # gates of other experts
            yield
        finally:
            for site, own in held.items():
                site.remove_all()
                for expert, factors in own.items():
                    site.add(expert, *factors)
            self.experts, self.context.state = everyone, None

    def tie(self, ties: Mapping[str, Ties], given: Collection[str] = ()) -> None:
        """Let experts have factors in common, see `moa.experts.ties`; fresh ones take those of the `given`, if any.
        Raises ValueError where ranks differ, and where factors of given experts do."""
        for places in tied_places(self.sites, ties):
            first, *rest = sorted(places, key=lambda place: place[0] not in given)
            parameter = self.factor(first)
            for place in rest:
                expert, site, factor = place
                check_same(self.whole(first), self.whole(place), first, place, expert in given)
                self.sites[site].tie(factor, expert, parameter)
                if expert in self.sites[site].starts:
                    start = self.sites[first[1]].factor("start", factor, first[0])
                    self.sites[site].tie(factor, expert, start, "start")
        self.context.forget()

    def factor(self, place: Place) -> nn.Parameter:
        expert, site, factor = place
        return self.sites[site].factor("lora", factor, expert)

    def whole(self, place: Place) -> Tensor:
        """A factor as its file has it: with that of a start."""
        expert, site, factor = place
        return self.sites[site].whole(expert)[self.sites[site].factors.index(factor)].detach()

    def key_of(self, place: Place) -> str:
        _, site, factor = place
        return self.sites[site].keys[self.sites[site].factors.index(factor)]

    def places(self) -> dict[int, list[Place]]:
        """Each parameter's id -> the places that have it."""
        found: dict[int, list[Place]] = {}
        for expert, spec in self.experts.items():
            for site in spec.sites:
                for factor in self.sites[site].factors:
                    place = expert, site, factor
                    found.setdefault(id(self.factor(place)), []).append(place)
        return found

    def train(self, trained: Mapping[str, Sequence[str]]) -> None:
        """Let experts train these factors and no others: {"vqa": ["B"], "line": []}.

        One that trains none is frozen: it takes part in the mixture and gets no gradient, so nothing moves it. Raises
        ValueError where experts have a factor in common and not all of them would train it.
        """
        after = {name: trained.get(name, self._spec(name).trained) for name in {**self.experts, **trained}}
        for places in self.places().values():
            learn = {e: f in after[e] for e, _, f in places}
            if len(set(learn.values())) > 1:
                does, does_not = ([e for e in learn if learn[e] == one] for one in (True, False))
                _, site, factor = places[0]
                raise ValueError(
                    f"experts {', '.join(learn)} have one lora_{factor} (first at {site}): {', '.join(does)} would "
                    f"train it, and {', '.join(does_not)} not; freeze all of them, or none"
                )
        for name, factors in trained.items():
            self.experts[name] = replace(self._spec(name), trained=tuple(f for f in FACTORS if f in factors))
            for site in self.experts[name].sites:
                for factor in self.sites[site].factors:
                    self.factor((name, site, factor)).requires_grad_(factor in factors)

    @torch.no_grad()
    def keep_largest(self, name: str, share: float | None) -> bool:
        """Let an expert's B have 0 everywhere but at its largest numbers, this share of those of all its layers, which
        alone learn from now on (LoRI-S, arXiv 2504.07448, section 3.2); None: all learn.

        Again it changes nothing: what it left is all that is not 0. Returns whether anything may learn: of a B of zeros
        nothing is larger, and all stays 0.
        """
        factors = {site: self.factor((name, site, "B")) for site in self._spec(name).sites}
        masks: dict[str, Tensor | None] = dict.fromkeys(factors)
        if share is not None:
            sizes = torch.cat([b.abs().flatten() for b in factors.values()])
            kept = torch.zeros_like(sizes).scatter(0, sizes.topk(round(share * len(sizes))).indices, 1.0) * (sizes > 0)
            parts = kept.split([b.numel() for b in factors.values()])
            masks = {site: own.view_as(b) for (site, b), own in zip(factors.items(), parts, strict=True)}
        for site, b in factors.items():
            mask = masks[site]
            self.sites[site].mask_b(name, mask)
            b.copy_(b if mask is None else b * mask)
        return share is None or any(bool(b.any()) for b in factors.values())

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Those of frozen experts with the gates of their ranks, factors that an expert does not train, the starts."""
        frozen = list[nn.Parameter]()
        for name, spec in self.experts.items():
            for site in spec.sites:
                own, factors = self.sites[site].own(name), self.sites[site].factors
                frozen += [p for f, p in zip(factors, own, strict=False) if f not in spec.trained]
                frozen += own[len(factors) :]
                if (learned := self.sites[site].learned_rank_gates(name)) is not None and spec.frozen:
                    frozen.append(learned)
        return frozen

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """Those of one expert, or of all, each once."""
        experts = self.names if name is None else [name]
        yield from {id(p): p for expert in experts for _, p in self.named_parameters(expert)}.values()

    def named_parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """One expert's, by the keys of its file, a start's with `start.` before; one that layers have in common comes
        under the key of each."""
        for site in self._spec(name).sites:
            keys = self.sites[site].keys
            yield from zip([*keys, *(f"start.{key}" for key in keys)], self.sites[site].own(name), strict=False)

    def state(self, name: str) -> dict[str, Tensor]:
        """What one expert's file holds, by key; without a start, the tensors share memory with the parameters."""
        return KINDS[self._spec(name).kind].state(self.sites, name)

    def load_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Overwrite experts with states of the same sites and shapes; ValueError for others, where a factor that
        experts have in common would not be one, and where another that has it too, and is not loaded, would change."""
        for places in self.places().values():
            loaded = [place for place in places if self.key_of(place) in states.get(place[0], ())]
            for place in places if loaded else []:
                expert, site, factor = place
                if place in loaded:
                    value = states[expert][self.key_of(place)]
                elif expert in states or not self.factor((expert, site, "B" if factor == "A" else "A")).any():
                    continue  # a missing key, an error below; or an update that is zero, and stays so
                else:
                    value = self.whole(place)
                check_same(states[loaded[0][0]][self.key_of(loaded[0])], value, loaded[0], place, True)
        for name, tensors in states.items():
            KINDS[self._spec(name).kind].overwrite(self.sites, name, tensors)
        self.context.forget()

    def peft_config(self, name: str) -> dict[str, Any]:
        spec = self._spec(name)
        return KINDS[spec.kind].config(self.sites, name, **spec.settings)

    def set_gates(
        self,
        gates: Float[Tensor, "batch site expert"],
        owners: Int[Tensor, " images"] | Owners | None = None,
        segments: Segments = None,
        *,
        expand: bool = False,
    ) -> None:
        """Gates of the coming forward, for every site or one row for all; experts as in `names`.

        A site of another stream than "text" has something else on its first axis, such as images: `owners` names the
        sample of each row, by stream, or of the stream "image" alone. A stream without owners must not run. `segments`
        names the sample of each token where rows of the text stream hold several (-1, padding, gets those of sample 0).
        `expand` lets generation repeat the samples.
        """
        if gates.shape[1] not in (1, len(self.sites)) or gates.shape[2] != len(self.names):
            raise ValueError(
                f"gates are {list(gates.shape)}; expected [batch, 1 or {len(self.sites)} sites, "
                f"{len(self.names)} experts {self.names}]"
            )
        rows = {"image": owners} if isinstance(owners, Tensor) else owners or {}
        streams = {"text": gates} | {stream: gates[rows_of] for stream, rows_of in rows.items()}
        # stream -> for each site (or once, for all) its gates [rows, 1, expert]
        by_site = {stream: own.unsqueeze(2).unbind(1) for stream, own in streams.items()}
        if segments is not None:
            # A packed row holds several samples, so that here each token has gates: [rows, seq, expert].
            tokens = segments.clamp(min=0)
            by_site["text"] = tuple(own[:, 0][tokens] for own in by_site["text"])
        per_site = gates.shape[1] > 1
        # In training every expert takes part, also with gate 0: each rank must have the same
        # gradients to exchange. Inference leaves out experts that no sample of the batch uses.
        used = None if torch.is_grad_enabled() else gates.ne(0).flatten(0, 1).any(0).tolist()
        everyone = used is None or all(used)
        self.context.state = GateState(
            gates={
                name: by_site[self.streams[name]][number if per_site else 0]
                for number, name in enumerate(self.sites)
                if self.streams[name] in by_site
            },
            experts=tuple(self.names),
            active=None if everyone else frozenset(compress(self.names, used or ())),
            expand=expand,
            watch=self.context.watch,
            streams=self.streams,
        )

    def route_tokens(
        self, decide: Decide, temperature: float | int = 1.0, *, recording: bool = True, **more: Any
    ) -> None:
        """Let token routers route the tokens of the coming forward; `more` are fields of `GateState`.

        `decide` turns the logits of tokens, over the temperature, into gates; `recording` keeps the logits, else
        generation may repeat the samples.
        """
        more |= {"temperature": temperature, "recording": recording, "expand": not recording}
        more |= {"watch": self.context.watch, "biases": self.token_biases, "streams": self.streams}
        self.context.state = GateState(gates=None, experts=tuple(self.names), decide=decide, **more)

    def take_token_logits(self) -> dict[str, Float[Tensor, "*_ choice"]]:
        """Site -> the logits of the last forward's tokens, over the temperature; kept no longer."""
        state, taken = self.context.state, dict[str, Tensor]()
        if state is not None:  # left there, they would keep the graph until the next forward
            taken, state.token_logits, state.decided = state.token_logits, {}, {}
        return taken

    def add_token_routers(
        self,
        *,
        choices: Sequence[str] | None = None,
        thresholds: int = 0,
        share: str = "site",
        arrow: bool = False,
        biased: bool = False,
        noisy: bool = False,
        mixed: bool = False,
        attention: int = 0,
        banks: Sequence[int] = (),
        num_tasks: int = 0,
        seed: int = 0,
        std: float | int = 0.02,
    ) -> None:
        """Float32 routers [choice, in] over each site's own experts among `choices`; all experts come before.

        None: all are choices. `thresholds` are rows more. `share`: which sites have one in common, see
        moa/experts/token_routers.py. `arrow`: they are computed from the experts and not learned.
        `biased`: each has a bias of zeros, see `moa.routing.gating.balanced_bias`. `noisy`: and rows of zeros, which
        give the scale of its noise in training. `mixed`: and the weight of a sample's decision beside it, which begins
        at sigmoid(-2) in the first router and at sigmoid(2) in the last. `attention`: not 0, each site has queries and
        keys of this width in the place of a router. `banks`: the bank of each choice, all at the same sites; each site
        has a row for each bank in its place. `num_tasks`: not 0, each task has a router of its own.
        """
        self.num_tasks = max(self.num_tasks, num_tasks)
        everyone = self.names if choices is None else choices
        own = {
            name: tuple(place for place, expert in enumerate(everyone) if expert in site.scalings)
            for name, site in self.sites.items()
            if site.scalings
        }
        for name, leader in leaders(own, self.streams, share).items():
            site, some = self.sites[name], own[name] if len(own[name]) < len(everyone) else None
            compared = tuple(everyone[place] for place in own[name]) if arrow or attention or banks else ()
            about: dict[str, Any] = {"compared": compared, "banks": tuple(banks), "by_task": num_tasks > 0}
            site.routed = TokenSite(leader=leader, choices=some, **about)
            if leader != name or not own[name] or arrow:
                continue
            device, num_banks = site.weight.device, max(banks, default=-1) + 1
            shapes = router_shapes(site.shape, len(own[name]), thresholds, attention, num_banks, num_tasks)
            for learned, shape in shapes.items():
                start = normal(shape, f"{seed}/{learned}/{name}") * std
                setattr(site, learned, nn.Parameter(start.to(device)))
            if noisy:
                site.token_noise = nn.Parameter(torch.zeros(len(own[name]), site.shape[1], device=device))
            if biased:
                self.token_biases[name] = torch.zeros(len(own[name]))
        deciding = [*self.token_routers()] if mixed else []
        for name, depth in zip(deciding, torch.linspace(-2, 2, len(deciding)), strict=True):
            self.sites[name].depth = nn.Parameter(depth[None].to(self.sites[name].weight.device))

    def gate_ranks(self, name: str, settings: RankGates, seed: int = 0) -> None:
        """Let the ranks of an expert have gates of their own; ValueError for more kept ranks than there are."""
        for site_name in self._spec(name).sites:
            site = self.sites[site_name]
            rank = site.ranks[name]
            if settings.keep > rank:
                raise ValueError(
                    f"experts.{name}.active_ranks: is {settings.keep}, and {site_name} has the rank {rank}"
                )
            start = settings.start(rank, site.shape[1], f"{seed}/rank_gates/{name}/{site_name}")
            site.gate_ranks(name, settings, None if start is None else nn.Parameter(start.to(site.weight.device)))
        self.num_tasks = max(self.num_tasks, settings.num_tasks)

    def rank_gates(self) -> dict[str, nn.Parameter]:
        """`<kind>.<expert>.<site>` -> what the gates of an expert's ranks learn there."""
        found = dict[str, nn.Parameter]()
        for name, spec in self.experts.items():
            for site in spec.sites:
                if (learned := self.sites[site].learned_rank_gates(name)) is not None:
                    found[f"{self.sites[site].ranked[name].kind}.{name}.{site}"] = learned
        return found

    def set_tasks(self, shares: Float[Tensor, "batch task"], owners: Owners, segments: Segments = None) -> None:
        """The tasks of the coming forward's samples, after its gates; `owners` and `segments` as in `set_gates`."""
        assert self.context.state is not None
        self.context.state.tasks = by_stream(shares, owners, segments)

    def site_routers(self) -> dict[str, nn.Parameter]:
        """`<kind>.<site>` -> all that sites learn to decide by, of the kinds of `moa.experts.token_routers.LEARNED`."""
        own = {f"{kind}.{name}": getattr(site, kind) for kind in LEARNED for name, site in self.sites.items()}
        return {key: learned for key, learned in own.items() if learned is not None}

    def token_choices(self) -> dict[str, tuple[int, ...] | None]:
        """Site with a token router -> the places of its experts among the choices; None: all."""
        learned, sites = self.token_routers(), {name: site.routed for name, site in self.sites.items()}
        computed = {name for name, own in sites.items() if own and own.compared and own.leader == name}
        return {n: None if own is None else own.choices for n, own in sites.items() if n in learned or n in computed}

    def token_routers(self) -> dict[str, nn.Parameter]:
        """Site that decides -> token router [choice, in]; empty where gates are decided per sample."""
        own = {
            n: site.task_router if site.token_router is None else site.token_router for n, site in self.sites.items()
        }
        return {name: router for name, router in own.items() if router is not None}

    def _spec(self, name: str) -> ExpertSpec:
        if name not in self.experts:
            near = difflib.get_close_matches(name, self.names)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no expert {name!r}; choices: {self.names}{hint}")
        return self.experts[name]

    def _check_new(self, name: str, routed: bool = True) -> None:
        if not EXPERT_NAME.fullmatch(name):
            raise ValueError(f"an expert's name is letters, digits, _ and -, got {name!r}")
        if name in self.experts:
            raise ValueError(f"there is an expert {name!r} already; choices: another name")
        if routed and self.token_choices():
            raise ValueError(f"expert {name}: add experts before the token routers")

    def _register(self, name: str, kind: str, settings: dict[str, Any]) -> None:
        sites = tuple(site for site, layer in self.sites.items() if name in layer.experts)
        if not sites:
            raise ValueError(
                f"experts.{name}: no layer is left for one of kind={kind}: all have experts of other kinds"
            )
        self.experts[name] = ExpertSpec(kind=kind, settings=settings, sites=sites)
        self.context.state = None  # gates of other experts


def by_stream(values: Float[Tensor, "batch value"], owners: Owners, segments: Segments) -> dict[str, Tensor]:
    """Values of samples as each stream's rows have them, [rows, 1, value], or [rows, seq, value] in packed rows."""
    found = {"text": values} | {stream: values[rows] for stream, rows in owners.items()}
    spread = {stream: own[:, None] for stream, own in found.items()}
    return spread if segments is None else spread | {"text": values[segments.clamp(min=0)]}


def check_same(one: Tensor, other: Tensor, first: Place, place: Place, values: bool) -> None:
    """ValueError for two factors that are to be one and differ in shape, or where asked for in `values`."""
    expert, site, factor = place
    about = f"expert {expert}: its lora_{factor} at {site} is to be that of {first[0]} at {first[1]}"
    if one.shape != other.shape:
        raise ValueError(f"{about}, and they are {list(other.shape)} and {list(one.shape)}")
    if values and one is not other and not torch.equal(one.to(other), other):
        difference = (one.to(other) - other).abs().max()
        raise ValueError(f"{about}, and they differ by up to {difference:.3g}")
