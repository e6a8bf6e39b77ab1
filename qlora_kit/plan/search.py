"""The largest batch and the longest sequence that fit, and the fastest settings that do.

Memory grows with tokens, very nearly in a straight line. So sizes are found by a few
predictions: a line through two of them says where to look next, and the answer is always one
that was predicted itself, beside a next larger one that does not fit.

Policies are words per layer, and a layer's memory and time hardly depend on the others'. So
the fastest mixture under a budget is that of a linear programme with one constraint: two kinds
of layers at most. Every kind is predicted for a model that has no other; the pairs are ranked
by what lines between them promise; and for the best of them the number of layers of the
faster kind is raised until the budget is full. Copies to the host run beside the computing, so
layers that wait for copies gain by others that do not. Weights kept decoded make kinds of their
own.

Larger batches of fewer accumulated passes are an update of the same rows, and are tried too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from transformers import PreTrainedConfig

from qlora_kit.block.policy import POLICIES
from qlora_kit.block.tiles import AUTO_FROM_TILES, AUTO_MOST
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import unsaid
from qlora_kit.plan.budget import Budget, needed_bytes, step_bytes
from qlora_kit.plan.edge import Remembered, largest
from qlora_kit.plan.gpus import Gpu
from qlora_kit.plan.predict import Prediction, predict
from qlora_kit.plan.setup import FULL, Setup

UNIT = 64
"""Sequences are multiples of this."""
MOST_TOKENS = 1 << 15
"""Of a batch: more rows at a time make nothing faster, and are looked for only if asked about."""
WORTH = 0.005
"""A gain in speed below this share is not worth more memory."""
_PAIRS = 4
"""Mixtures that are looked at in full."""
_DECODED_WITH = ("save", "recompute_elementwise")
"""Policies beside which decoded weights are a good use of memory."""


class Planner:
    """Predictions for one model on one GPU under one budget, each made once.

    Example:
        >>> from transformers import LlamaConfig
        >>> from qlora_kit.plan.gpus import find_gpu
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> planner = Planner(config, find_gpu("l4"), Budget.of("1GiB"))
        >>> planner.fits(Setup(rank=8, seq=128)), planner.traced
        (True, 1)
    """

    def __init__(self, config: PreTrainedConfig, gpu: Gpu, budget: Budget) -> None:
        """Predict nothing yet.

        Args:
            config: of a causal language model.
            gpu: the run would be on.
            budget: what it may take.
        """
        self.config = config
        self.gpu = gpu
        self.budget = budget
        self._made: dict[str, Prediction] = {}

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def traced(self) -> int:
        """Predictions made so far."""
        return len(self._made)

    def predict(self, setup: Setup) -> Prediction:
        """Predict a run.

        Args:
            setup: of the run.

        Returns:
            The prediction, the same object for the same setup.

        Raises:
            ConfigError: the model cannot be planned.
        """
        key = repr(setup)
        if key not in self._made:
            try:
                with unsaid():
                    self._made[key] = predict(self.config, setup, self.gpu)
            except (RuntimeError, TypeError) as error:  # what needs a value, on the meta device
                what = str(error).strip().split("\n", 1)[0]
                raise ConfigError(
                    f"a training step of {type(self.config).__name__} cannot be traced without "
                    f"weights ({what})."
                ) from error
        return self._made[key]

    def fits(self, setup: Setup) -> bool:
        """Whether a run fits the budget, margin included."""
        return self.room(setup) >= 0

    def room(self, setup: Setup) -> int:
        """Bytes that a run leaves free; negative if it does not fit."""
        return self.budget.room(self.predict(setup))

    @property
    def positions(self) -> int:
        """The longest row that the model was made for; `MOST_TOKENS` where it does not say."""
        text = self.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or MOST_TOKENS)

    def longest(self, setup: Setup) -> int:
        """The longest sequence that fits, up to what the model was made for.

        Args:
            setup: of the run; a `seq` beyond the model's positions allows for more.

        Returns:
            Tokens of a row, a multiple of `UNIT`; 0 if not even `UNIT` fit.
        """
        most = max(1, max(self.positions, setup.seq) // UNIT)
        room = Remembered(lambda n: self.room(setup.with_tokens(seq=n * UNIT)))
        tiled = _TILED_TOKENS // UNIT // setup.batch + 1
        found = self._largest(room, setup, setup.seq // UNIT, most)
        if 0 < found < tiled <= most and room(tiled) >= 0:  # tiles make more tokens cheaper
            found = largest(room, most, guess=tiled)
        return UNIT * found

    def largest_batch(self, setup: Setup) -> int:
        """The largest batch that fits, up to `MOST_TOKENS`.

        Args:
            setup: of the run; a larger `batch` allows for more.

        Returns:
            Rows; 0 if not even one fits.
        """
        most = max(1, MOST_TOKENS // setup.seq, setup.batch)
        room = Remembered(lambda n: self.room(setup.with_tokens(batch=n)))
        return self._largest(room, setup, setup.batch, most)

    def _largest(self, room: Remembered, setup: Setup, now: int, most: int) -> int:
        """`largest`, from what would fit if a step's memory were in proportion to its tokens."""
        now = min(max(1, now), most)
        made = self.predict(setup)
        takes = max(1, needed_bytes(made) - _resident(made))
        room(now)
        return largest(room, most, guess=int(now * (1 + self.budget.room(made) / takes)))

    def thriftiest(self, setup: Setup) -> Setup:
        """The same run with the policy that takes the least memory of the GPU.

        Args:
            setup: of the run.

        Returns:
            A setup.
        """
        made = [replace(setup, activations=p, keep_decoded=0) for p in self._policies(setup)]
        return min(made, key=lambda one: needed_bytes(self.predict(one)))

    def _policies(self, setup: Setup) -> Sequence[str]:
        """Words that make a difference, from the most memory to the least."""
        if self.predict(setup).fused:
            host = self.budget.host_bytes
            return POLICIES if host != 0 else [p for p in POLICIES if "offload" not in p]
        return ("save", "recompute_all")

    def kinds(self, setup: Setup, *, decoded: bool = True) -> list[Setup]:
        """The run with all layers alike, in every way that makes a difference.

        Args:
            setup: of the run; its policy does not matter.
            decoded: whether weights may be kept decoded; if not, it is as the run says.

        Returns:
            Setups, from the most memory to the least.
        """
        if not decoded:
            return [replace(setup, activations=p) for p in self._policies(setup)]
        made = [replace(setup, activations=p, keep_decoded=0) for p in self._policies(setup)]
        stays = setup.bits == 4 and setup.method not in (FULL, "dora")  # whose rows change
        if not (stays and self.predict(setup).fused):
            return made
        kept = [replace(one, keep_decoded=self.layers) for one in made]
        return [one for one in kept if one.activations in _DECODED_WITH] + made

    def fastest(self, setup: Setup, *, decoded: bool = True) -> Prediction | None:
        """The fastest way to keep activations and decoded weights that fits.

        Args:
            setup: of the run; its policy does not matter.
            decoded: whether weights may be kept decoded; if not, it is as the run says.

        Returns:
            The prediction, its setup included; None if nothing fits.
        """
        made = [self.predict(kind) for kind in self.kinds(setup, decoded=decoded)]
        fit = [one for one in made if self.budget.fits(one)]
        if not fit:
            return None
        quickest = min(made, key=lambda one: one.step_s)
        if not self.budget.fits(quickest) and quickest.fused and self.layers > 1:
            fit += self._mixtures(made, min(one.step_s for one in fit))
        return _choose(fit)

    def _mixtures(self, made: list[Prediction], best: float) -> Iterator[Prediction]:
        """The best mixtures of two kinds."""
        ranked = sorted(made, key=self.budget.room)  # the most memory first
        pairs = list(combinations(ranked, 2))
        promises = [(*self._promise(*pair), at) for at, pair in enumerate(pairs)]
        for promise, count, at in sorted(promises)[:_PAIRS]:
            if promise > best * (1 - WORTH / 2):
                return
            found = self._fill(*pairs[at], count)
            if found is not None:
                best = min(best, found.step_s)
                yield found

    def _promise(self, one: Prediction, other: Prediction) -> tuple[float, int]:
        """What lines between two kinds promise: the time, and layers of the first kind.

        With a layer more than fits by the lines: memory of a mixture is often below them, for
        the working set of one kind comes when what the other kept is gone.
        """
        layers = self.layers
        limits = list(zip(_limits(one, self.gpu), _limits(other, self.gpu), strict=True))
        rooms = self.budget.room(one), self.budget.room(other)
        found = [(float("inf"), 0)]
        for n in range(1, layers):
            least = min(((n + d) / layers for d in (-1, 1)), key=lambda s: -_between(s, *rooms))
            if _between(least, *rooms) >= 0:
                found.append((max(_between(n / layers, *pair) for pair in limits), n))
        return min(found)

    def _fill(self, one: Prediction, other: Prediction, guess: int) -> Prediction | None:
        """The mixture with the most layers of the first kind that fits, about as promised."""
        layers = self.layers
        room = Remembered(lambda n: self.room(mixture(one.setup, other.setup, n, layers)))
        # more layers that wait for copies would be slower again
        most = guess if one.limited_by == "link" else layers - 1
        count = largest(room, most, guess=guess)
        return self.predict(mixture(one.setup, other.setup, count, layers)) if count else None

    def fastest_update(
        self, setup: Setup, *, optimizers: Sequence[str] = (), batches: bool = True
    ) -> Prediction | None:
        """The fastest way to make an update of the same rows.

        Args:
            setup: of the run; its policy does not matter.
            optimizers: names that may be used instead.
            batches: whether rows may be divided otherwise among accumulated passes.

        Returns:
            The prediction, its setup included; None if nothing fits.
        """
        found = []
        for name in dict.fromkeys((setup.optimizer, *optimizers)):
            own = replace(setup, optimizer=name)
            for divided in self._divisions(own) if batches else [own]:
                one = self.fastest(divided)
                found += [one] if one is not None else []
        return _choose(found) if found else None

    def _divisions(self, setup: Setup) -> list[Setup]:
        """Batches worth a look: as asked, the largest that fits, and half of that.

        Where the largest fits by a thrifty policy only, a smaller one may be faster.
        """
        rows = setup.batch * setup.accumulation
        widest = max(setup.batch, MOST_TOKENS // setup.seq)
        divisors = [n for n in range(1, min(rows, widest) + 1) if rows % n == 0]
        thrifty = self.thriftiest(setup)
        most = largest(
            Remembered(lambda at: self.room(_divided(thrifty, divisors[at - 1]))),
            len(divisors),
            guess=divisors.index(setup.batch) + 1,
        )
        if not most:
            return [setup]
        wanted = {divisors[most - 1], divisors[max(0, most - 2)]}
        wanted |= {n for n in (setup.batch,) if n <= divisors[most - 1]}
        return [_divided(setup, n) for n in sorted(wanted)]


def mixture(fast: Setup, slow: Setup, count: int, layers: int) -> Setup:
    """A run with some layers of one kind and the others of another.

    The first layers' memory is needed last, so those that keep less come first: their working
    set then comes when the others' memory is free again. Decoded weights are kept from the
    first layer on, so where only one kind keeps them, it comes first.

    Args:
        fast: a kind of `Planner.kinds`.
        slow: another.
        count: layers of the first kind.
        layers: of the model.

    Returns:
        The mixed setup.

    Example:
        >>> save, less = Setup(activations="save"), Setup(activations="recompute_all")
        >>> mixture(save, less, 8, 32).activations
        'recompute_all:24,save:8'
    """
    first, second = (slow, layers - count), (fast, count)
    kept = 0
    if fast.keep_decoded == slow.keep_decoded:
        kept = fast.keep_decoded
    elif fast.keep_decoded:
        first, second, kept = second, first, count
    elif slow.keep_decoded:
        kept = layers - count
    words = fast.activations
    if fast.activations != slow.activations:
        words = ",".join(f"{kind.activations}:{number}" for kind, number in (first, second))
    return replace(slow, activations=words, keep_decoded=kept)


def _between(share: float, one: float, other: float) -> float:
    return share * one + (1 - share) * other


def _limits(made: Prediction, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds of computing, of copies to the host and back, of launching if that is longest."""
    launching = made.step_s if made.limited_by == "host" else 0.0
    return sum(made.seconds.values()), made.moved_bytes / gpu.link, launching


def _resident(made: Prediction) -> int:
    """Bytes that no batch and no sequence changes."""
    return made.peak_bytes - step_bytes(made) + made.outside


_TILED_TOKENS = AUTO_FROM_TILES * AUTO_MOST
"""Of a batch: from here on, it is in tiles."""


def _divided(setup: Setup, batch: int) -> Setup:
    rows = setup.batch * setup.accumulation
    return replace(setup, batch=batch, accumulation=rows // batch)


def _choose(found: Sequence[Prediction]) -> Prediction:
    """The least memory among those that are about as fast as the fastest."""
    best = min(one.step_s for one in found)
    near = [one for one in found if one.step_s <= best * (1 + WORTH)]
    return min(near, key=lambda one: (needed_bytes(one), one.step_s))
