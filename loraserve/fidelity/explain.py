"""Why a load was predicted badly: what the processors did, and what fitting that load itself would change."""

from collections.abc import Sequence

from loraserve.fidelity.figures import LABELS, Compared
from loraserve.fidelity.fit import Fit
from loraserve.fidelity.processors import ProcessorUse

BUSY = 0.85
NOTABLE_OTHERS = 0.1
SHAKEN = 0.03
"""How much step times are changed to see what a figure makes of it."""

NOTABLE_LEVERAGE = 5.0
"""A figure that changes by so many times as much from the shorter to the longer steps is told of."""


def explain(
    missed: Sequence[Compared],
    use: ProcessorUse,
    fitted: Fit,
    refit: Fit | None,
    refit_missed: Sequence[Compared],
    shaken: Sequence[Sequence[Compared]],
) -> tuple[str, ...]:
    """Lines for what was missed; none if nothing was. `shaken` are the same comparisons with all simulated
    steps a little shorter and a little longer."""
    if not missed:
        return ()
    lines = [f"processors: {processors_line(use)}"]
    if use.others >= NOTABLE_OTHERS:
        lines.append(
            f"{use.others:.0%} of the machine went to programs outside the cluster: repeat it on an idle one"
        )
    if use.total >= BUSY:
        lines.append(
            f"the machine was {use.total:.0%} busy: router, replicas and client wait for a processor, which "
            "no delay that is the same at every load stands for"
        )
    if refit is not None:
        lines.append(_refit_line(fitted, refit, missed, refit_missed))
    lines += [
        f"{LABELS[one.name]}: what the simulator says is the live run's percentile {100 * one.level:.1f}"
        for one in missed
        if one.level is not None
    ]
    lines += _leverage_lines(missed, shaken)
    chance = [one for one in missed if one.lowest <= one.live <= one.highest]
    if chance:
        lines.append(
            f"{', '.join(LABELS[one.name] for one in chance)}: the simulations themselves, each with other "
            "lots among equal replicas, reach from below the live figure to above it"
        )
    return tuple(lines)


def _leverage_lines(missed: Sequence[Compared], shaken: Sequence[Sequence[Compared]]) -> list[str]:
    lines = []
    for one in missed:
        reached = sorted(other.simulated for run in shaken for other in run if other.name == one.name)
        if reached and reached[-1] - reached[0] > SHAKEN * one.simulated * NOTABLE_LEVERAGE:
            lines.append(
                f"{LABELS[one.name]}: with steps {SHAKEN:.0%} shorter or longer the simulator says "
                f"{reached[0]:.0f} or {reached[-1]:.0f}: so near saturation little is much"
            )
    return lines


def processors_line(use: ProcessorUse) -> str:
    """Who had how much of the machine."""
    shares = ", ".join(
        f"{name} {share / use.processors:.0%}" for name, share in sorted(use.busy.items()) if share > 0.005
    )
    return f"{use.total:.0%} of {use.processors} busy ({shares})"


def _refit_line(fitted: Fit, refit: Fit, missed: Sequence[Compared], left: Sequence[Compared]) -> str:
    then, now = fitted.overheads, refit.overheads
    decode = now.step_factor / then.step_factor - 1
    prompts = now.prefill_factor / then.prefill_factor - 1
    delay_ms = (now.message_delay_s - then.message_delay_s) * 1e3
    gone = sorted({one.name for one in missed} - {one.name for one in left})
    what = (
        f"of the figures missed, {', '.join(LABELS[name] for name in gone)} would then be met"
        if gone
        else "none of the figures missed would then be met, so the cause is no constant overhead"
    )
    return (
        f"in this load alone, steps took {decode:+.1%}, their prompts' tokens {prompts:+.1%} and a message "
        f"{delay_ms:+.1f} ms more than in the load fitted; {what}"
    )
