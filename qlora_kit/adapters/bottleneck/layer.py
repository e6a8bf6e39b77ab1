"""Bottleneck adapters: a narrow network behind a sublayer, before its residual add.

    y = h + W_u f(W_d h + b_d) + b_u        h (..., d), W_d (m, d), W_u (d, m)

with h the output of attention's or the feed-forward's last linear, so a piece wraps that linear.
2dm + m + d values each. Three arrangements:

    houlsby    behind attention and behind the feed-forward; the model's layer norms are trained
               too; f = GELU (arXiv:1902.00751)
    pfeiffer   behind the feed-forward alone; f = ReLU; reduction 16 (arXiv:2005.00247)
    lin        behind the feed-forward, on h normalised by a layer norm of its own, whose γ = 1
               and β = 0 are trained: + 2d values; f = ReLU (arXiv:2004.03829, the AdapterL of
               LoRA's paper)

W_d and W_u start from N(0, 0.01²) cut at two σ, biases at zero, as Houlsby's code does: nearly
the identity, the output of a fresh adapter differs from the base's in the fourth digit.
`init=zero` starts W_u at zero instead, at exactly the base. Dropout that a model has behind the
linear (BERT) comes behind the adapter.

AdapterDrop (arXiv:2010.11918): `drop_layers` leaves the first layers without an adapter, in
training and after; `drop_random` draws how many of the first layers skip theirs anew for every
training batch, so that a trained adapter may be cut to any number afterwards
(`Dropping.at_inference`).

Defaults: houlsby, reduction 16, `init: normal`, float32 masters, no layer dropped.

An adapter is not a change of one linear map and cannot be merged; it costs two small products in
sequence at inference, which `qlora-kit bench latency` measures.

With δ = g + f'(·) terms as autograd has them, the gradients are those of the formula; x of the
wrapped linear is not kept, h and f(...) are. W_d and W_u are masters in `dtype`, rounded to the
dtype of h for the products.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.linears import LINEARS, linear_shape
from qlora_kit.adapters.protocol import LinearWrapper, Piece, TrainedCopy
from qlora_kit.adapters.targets import inside, is_norm
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.patterns import matches_any

SIGMA = 0.01
"""Of the normal start; values beyond two of it are drawn again."""

AFTER_ATTENTION = (
    "self_attn.o_proj",
    "self_attn.dense",
    "self_attn.out_proj",
    "attn.c_proj",
    "attention.output.dense",
)
"""Usual endings of attention's last linear: Llama-like, Phi, OPT, GPT-2, BERT."""
AFTER_FEEDFORWARD = ("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "output.dense", "fc2")
"""Usual endings of the feed-forward's last linear, in the same families."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Dropping:
    """How many of the first layers skip their adapters: AdapterDrop's, for all pieces.

    Attributes:
        now: in this batch.
        at_inference: outside of training; set it to cut a trained adapter.
    """

    def __init__(self, most: int, seed: int) -> None:
        """Start with none.

        Args:
            most: layers that may be skipped; drawn for every training batch.
            seed: of the draws.
        """
        self.most = most
        self.at_inference = 0
        self.now = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._first = True

    def draw(self, module: nn.Module, _inputs: object) -> None:
        """A forward pre-hook of the model: once per batch, so that recomputed layers agree."""
        if not module.training:
            self.now = self.at_inference
            return
        # none in the first pass: every adapter shows once that gradients reach it
        drawn = int(torch.randint(0, self.most + 1, (), generator=self._generator))
        self.now, self._first = (0 if self._first else drawn), False


class BottleneckLinear(LinearWrapper):
    """A linear whose output passes through a bottleneck.

    Attributes:
        base: the frozen linear.
        down: (m, d) and (m,), in the master dtype.
        up: (d, m) and (d,).
        norm: of kind `lin`, else None.

    Example:
        >>> adapter = BottleneckLinear(nn.Linear(4, 8), "proj", Bottleneck(width=2), seed=0)
        >>> sum(p.numel() for p in adapter.trainable().values())  # 2dm + m + d
        42
        >>> adapter(torch.ones(3, 4)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        base: nn.Module,
        place: str,
        config: Bottleneck,
        *,
        seed: int,
        layer: int = 0,
        dropping: Dropping | None = None,
    ) -> None:
        """Wrap a linear.

        Args:
            base: whose output is transformed. Not modified.
            place: its dotted name in the model.
            config: kind, width, start and dtype.
            seed: the run's; with `place` it decides the start.
            layer: index of the layer it belongs to.
            dropping: shared with the other pieces; None: nothing is ever skipped.
        """
        super().__init__(base, place)
        d = linear_shape(base)[0]
        m = config.width_of(d)
        device, dtype = next(base.parameters()).device, getattr(torch, config.dtype)
        self.layer, self._dropping = layer, dropping
        gelu = config.activation == "auto" and config.kind == "houlsby"
        self.activation = "gelu" if gelu else config.activation.replace("auto", "relu")
        # made on the meta device, so that no time goes into a start that is replaced
        options = {"device": "meta", "dtype": dtype}
        self.down = nn.Linear(d, m, **options).to_empty(device=device)
        self.up = nn.Linear(m, d, **options).to_empty(device=device)
        self.norm = nn.LayerNorm(d, device=device, dtype=dtype) if config.kind == "lin" else None
        if device.type != "meta":
            self._start(config, seed)

    def _start(self, config: Bottleneck, seed: int) -> None:
        digest = hashlib.sha256(f"{seed}:{self.place}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        with torch.no_grad():
            for linear in (self.down, self.up):
                start = torch.empty(linear.weight.shape)
                nn.init.trunc_normal_(
                    start, std=SIGMA, a=-2 * SIGMA, b=2 * SIGMA, generator=generator
                )
                linear.weight.copy_(start)
                linear.bias.zero_()
            if config.init == "zero":
                self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear, then the bottleneck unless it is off or dropped.

        Args:
            x: (..., K).

        Returns:
            (..., d) in the dtype the base answers with.
        """
        h: Tensor = self.base(x)
        dropped = self._dropping is not None and self.layer < self._dropping.now
        if not self.enabled or dropped:
            return h
        z = h
        if self.norm is not None:
            own = self.norm.weight.dtype
            z = self.norm(h.to(own)).to(h.dtype)
        z = _FUNCTIONS[self.activation](_linear(z, self.down))
        return h + _linear(z, self.up)

    def trainable(self) -> dict[str, nn.Parameter]:
        """W_d, b_d, W_u and b_u; of kind `lin` γ and β as well."""
        parts = {"down": self.down, "up": self.up, "norm": self.norm}
        return {f"{k}.{n}": p for k, m in parts.items() if m for n, p in m.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return dict(self.trainable())

    def extra_repr(self) -> str:
        """Show what distinguishes this adapter."""
        return f"width={self.down.out_features}, activation={self.activation}"


def _linear(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


class RandomDrop:
    """AdapterDrop's draws: a hook of the model, and no parameter.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> piece = RandomDrop(Dropping(2, seed=0))
        >>> piece.install(model)
        >>> draws = []
        >>> for _ in range(9):
        ...     _ = model(torch.ones(1))
        ...     draws.append(piece.dropping.now)
        >>> draws[0], set(draws) <= {0, 1, 2}
        (0, True)
    """

    def __init__(self, dropping: Dropping, place: str = "") -> None:
        """Take the pieces' common state.

        Args:
            dropping: shared with the pieces.
            place: the module whose forward starts a batch; "" for the model.
        """
        self.dropping, self.place, self.enabled = dropping, place, True

    def install(self, model: nn.Module) -> None:
        """Draw before every forward pass."""
        module = model.get_submodule(self.place)
        self._handle = module.register_forward_pre_hook(self.dropping.draw)

    def uninstall(self, _model: nn.Module) -> None:
        """Stop drawing."""
        self._handle.remove()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def merge_delta(self) -> None:
        """Return None."""


def bottleneck_pieces(
    model: nn.Module, config: Bottleneck, seed: int, *, outside: Sequence[str] = ()
) -> list[Piece]:
    """Place bottlenecks on every layer of a model.

    Args:
        model: the model to adapt.
        config: where and how large.
        seed: of the start.
        outside: modules trained whole; nothing inside them is taken.

    Returns:
        Pieces in the model's order, not installed.

    Raises:
        AdapterError: the model has no linears called as the configuration says.

    Example:
        >>> layer = nn.ModuleDict({"fc2": nn.Linear(4, 4)})
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
        >>> config = Bottleneck(kind="pfeiffer", width=2)
        >>> [piece.place for piece in bottleneck_pieces(model, config, 0)]
        ['layers.0.fc2']
    """
    places = _places(model, config, outside)
    layers = sorted({layer for layer, _ in places.values()})
    if max(config.drop_layers, config.drop_random) >= len(layers):
        raise AdapterError(
            f"bottleneck.drop_layers is {config.drop_layers} and drop_random {config.drop_random}, "
            f"and the model has {len(layers)} layers with adapters. Leave at least one."
        )
    dropped = set(layers[: config.drop_layers])
    kept = {n: layer for n, (layer, _) in places.items() if layer not in dropped}
    dropping = Dropping(config.drop_random, seed) if config.drop_random else None
    pieces: list[Piece] = [
        BottleneckLinear(places[n][1], n, config, seed=seed, layer=layer, dropping=dropping)
        for n, layer in kept.items()
    ]
    if config.trains_norms:
        dtype = getattr(torch, config.dtype)
        pieces += [TrainedCopy(m, n, dtype) for n, m in _norms(model, outside, dropped)]
    if dropping is not None:
        prefix = getattr(model, "base_model_prefix", "")
        pieces.append(RandomDrop(dropping, prefix if hasattr(model, prefix or " ") else ""))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(pieces, key=lambda piece: order[piece.place])


def _places(
    model: nn.Module, config: Bottleneck, outside: Sequence[str]
) -> dict[str, tuple[int, nn.Module]]:
    """Name of every linear to wrap, to its layer and itself."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    attention = config.after_attention or AFTER_ATTENTION
    feedforward = config.after_feedforward or AFTER_FEEDFORWARD
    found: dict[str, tuple[int, nn.Module]] = {}
    seen = {"attention": False, "feed-forward": False}
    for name, module in model.named_modules():
        owner = next((n for n in lists if name.startswith(f"{n}.")), None)
        if owner is None or not isinstance(module, LINEARS) or inside(name, set(outside)):
            continue
        behind = matches_any(name, attention)  # BERT's attention.output.dense ends in both
        if not behind and not matches_any(name, feedforward):
            continue
        seen["attention" if behind else "feed-forward"] = True
        if not behind or config.kind == "houlsby":
            layer = int(name.removeprefix(f"{owner}.").partition(".")[0])
            found[name] = (layer, module)
    lacking = [k for k, there in seen.items() if not there]
    if config.kind != "houlsby":
        lacking = [k for k in lacking if k != "attention"]
    if lacking:
        linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LINEARS)}
        raise AdapterError(
            f"bottlenecks go behind the last linears of {' and '.join(lacking)}, and "
            f"{type(model).__name__} has none that is called as usual. Name them in "
            "bottleneck.after_attention and after_feedforward; its linear layers end in: "
            f"{', '.join(sorted(linears))}."
        )
    return found


def _norms(
    model: nn.Module, outside: Sequence[str], dropped: set[int]
) -> list[tuple[str, nn.Module]]:
    """The norms of blocks that have adapters; not those on queries and keys."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = []
    for name, module in model.named_modules():
        owner = next((n for n in lists if name.startswith(f"{n}.")), None)
        if owner is None or not is_norm(module) or inside(name, set(outside)):
            continue
        layer = int(name.removeprefix(f"{owner}.").partition(".")[0])
        if layer not in dropped and not name.endswith(("q_norm", "k_norm")):
            found.append((name, module))
    return found
