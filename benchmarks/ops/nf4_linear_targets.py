"""What nf4_linear is meant to reach, and how far a record is from it.

Ratios to a dense bf16 linear without LoRA, on an H100; ours carries LoRA of rank 16.
"""

import math

Row = dict[str, object]

TARGETS = (  # (up to M rows, target forward, target backward dX, never worse than)
    (4, 0.40, 0.50, 0.60),
    (16, 0.50, 0.60, 0.80),
    (64, 0.80, 0.90, 1.15),
    (256, 1.00, 1.05, 1.40),
    (1024, 1.05, 1.08, 1.35),
    (2048, 1.05, 1.06, 1.15),
    (8192, 1.02, 1.03, 1.07),
)
MEAN_TARGET = 0.85
"""Of the geometric mean of all ratios of the grid, forward and backward dX."""


def target(which: str, m: int) -> tuple[float, float] | None:
    """The target and the bound of one point.

    Args:
        which: the pass; `backward`, with all gradients, has no target.
        m: rows of x.

    Returns:
        The ratio to reach and the one never to exceed, or None.
    """
    for most, forward, backward, bound in TARGETS:
        if m <= most and which in ("forward", "backward_dx"):
            return (forward if which == "forward" else backward), bound
    return None


def ratios(rows: list[Row]) -> dict[tuple[object, ...], dict[str, float]]:
    """Milliseconds of each implementation by (N, K, pass, M), over dense."""
    found: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        point = row["n"], row["k"], row["pass"], row["m"]
        found.setdefault(point, {})[str(row["impl"])] = float(str(row["ms_median"]))
    return {
        point: {name: value / ms["dense"] for name, value in ms.items()}
        for point, ms in found.items()
    }


def verdict(which: str, m: int, ratio: float) -> str:
    """`pass`, `miss`, or `FLOOR` where it is worse than it may ever be; empty without a target."""
    wanted = target(which, m)
    if wanted is None:
        return ""
    if ratio <= wanted[0]:
        return "pass"
    return "miss" if ratio <= wanted[1] else "FLOOR"


def judge(rows: list[Row]) -> str:
    """The rest of a point's line: strategy, target, and whether peft is slower.

    Args:
        rows: of one point.

    Returns:
        Such as `[small_m] 0.40 pass`.
    """
    ((point, found),) = ratios(rows).items()
    _, _, which, m = point
    text = f"[{next(row['strategy'] for row in rows if row['impl'] == 'ours')}]"
    wanted = target(str(which), int(str(m)))
    if wanted:
        text += f" {wanted[0]:.2f} {verdict(str(which), int(str(m)), found['ours'])}"
    return text + (" SLOWER THAN PEFT" if found["ours"] >= found["peft"] else "")


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[Row]) -> str:
    """What a whole record says, in a few lines.

    Args:
        rows: of a record.

    Returns:
        Points met and missed, means, and the points where peft is as fast.
    """
    table = ratios(rows)
    lines = []
    everything = []
    for which in ("forward", "backward_dx", "backward"):
        part = {point: found for point, found in table.items() if point[2] == which}
        if not part:
            continue
        ours = [found["ours"] for found in part.values()]
        verdicts = [
            verdict(which, int(str(point[3])), found["ours"]) for point, found in part.items()
        ]
        slower = [
            f"{n}x{k} M {m}"
            for (n, k, _, m), found in part.items()
            if found["ours"] >= found["peft"]
        ]
        text = f"{which}: geometric mean {geometric_mean(ours):.3f} of dense"
        if any(verdicts):
            everything += ours
            text += "".join(f", {verdicts.count(v)} {v}" for v in ("pass", "miss", "FLOOR"))
        lines.append(text + f"; not faster than peft: {', '.join(slower) or 'nowhere'}")
    if everything:
        mean = geometric_mean(everything)
        reached = "pass" if mean <= MEAN_TARGET else "miss"
        lines.append(f"all: geometric mean {mean:.3f} of dense, target {MEAN_TARGET} {reached}")
    return "\n".join(lines)


def strategy_table(rows: list[Row]) -> str:
    """Which strategy is fastest where, from a record of `--strategies`.

    Args:
        rows: of the record.

    Returns:
        Per pass and M the mean ratio of each strategy over the shapes it serves, the
        fastest one of each shape.
    """
    times: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        point = row["pass"], row["m"], row["n"], row["k"]
        name = "bf16" if row["impl"] == "dense" else str(row["strategy"])
        times.setdefault(point, {})[name] = float(str(row["ms_median"]))
    lines = []
    for which, m in dict.fromkeys(point[:2] for point in times):
        found = {point[2:]: ms for point, ms in times.items() if point[:2] == (which, m)}
        names = dict.fromkeys(name for ms in found.values() for name in ms if name != "bf16")
        means = {
            name: geometric_mean([ms[name] / ms["bf16"] for ms in found.values() if name in ms])
            for name in names
        }
        text = "  ".join(f"{name} {mean:5.2f}" for name, mean in means.items())
        best = "  ".join(
            f"{n}x{k} {min((ms[name], name) for name in names if name in ms)[1]}"
            for (n, k), ms in found.items()
            if len(ms) > 1
        )
        lines.append(f"{which:11} M {m:5}  {text}  | fastest: {best}")
    return "\n".join(lines)
