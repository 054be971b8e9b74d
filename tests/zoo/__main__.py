"""``python -m tests.zoo [--model NAME]... [--layout NAME]... [--out FILE]``: trains the zoo and prints the table of verdicts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.zoo.case import LAYOUTS
from tests.zoo.keeper import Keeper, cases, expectation
from tests.zoo.models import MODELS
from tests.zoo.verdict import FAILURES, Verdict, unexpected

SIGNS = {
    "equal": "=",
    "refused": "refused",
    "DDP": "as DDP",
    "microbatches in one process": "as mb",
    "random": "random",
    "told": "told",
}


def table(verdicts: dict[tuple[str, str, str], Verdict]) -> list[str]:
    lines = [f"| model, data | {' | '.join(LAYOUTS)} |", f"|{' --- |' * (len(LAYOUTS) + 1)}"]
    for model, data in dict.fromkeys((model, data) for model, data, _ in verdicts):
        cells = []
        for layout in LAYOUTS:
            verdict = verdicts.get((model, data, layout))
            cells.append("" if verdict is None else SIGNS.get(verdict.word, f"**{verdict.word}**"))
        lines.append(f"| {model}{'' if data == 'plain' else f', {data}'} | {' | '.join(cells)} |")
    return lines


def told(verdicts: dict[tuple[str, str, str], Verdict], words: tuple[str, ...]) -> list[str]:
    """Verdicts of these words with their reasons, one line for layouts that say the same."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for (model, data, layout), verdict in verdicts.items():
        if verdict.word in words:
            grouped.setdefault((model, data, verdict.word, verdict.why.replace("\n", " ")), []).append(layout)
    return [f"- {m}, {d}; {', '.join(ls)}: **{word}** {why[:900]}" for (m, d, word, why), ls in grouped.items()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--layout", action="append", default=[])
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further run is begun")
    chosen = parser.parse_args()
    keeper = Keeper()
    start, verdicts, surprises, slow = time.monotonic(), {}, [], []
    for case in cases():
        if (chosen.model and case[0] not in chosen.model) or (chosen.layout and case[2] not in chosen.layout):
            continue
        if (chosen.data and case[1] not in chosen.data) or time.monotonic() - start > chosen.budget:
            continue
        began = time.monotonic()
        verdicts[case] = keeper.run(*case)
        slow.append((time.monotonic() - began, case))
        print(f"{slow[-1][0]:5.1f} s  {', '.join(case)}: {verdicts[case].word} {verdicts[case].why[:300]}", flush=True)
        if surprise := unexpected(verdicts[case], expectation(*case)):
            surprises.append(f"- {', '.join(case)}: {surprise}".replace("\n", " "))
    keeper.close()
    took = time.monotonic() - start
    counts = ", ".join(f"{sum(v.word == word for v in verdicts.values())} {word}" for word in (*SIGNS, *FAILURES))
    slow.sort(reverse=True)
    lines = [
        f"{len(MODELS)} models, {len(verdicts)} runs in {took:.0f} s, {keeper.worlds} worlds: {counts}.",
        "",
        *table(verdicts),
        "",
        "## Failures",
        "",
        *told(verdicts, FAILURES),
        "",
        "## Not as the table of expectations says",
        "",
        *[line[:900] for line in surprises],
        "",
        "## Refused, and different by nature",
        "",
        *told(verdicts, ("refused", "DDP", "microbatches in one process", "told")),
        "",
        f"Slowest: {'; '.join(f'{seconds:.1f} s {case}' for seconds, case in slow[:10])}",
    ]
    print("\n".join(lines))
    if chosen.out:
        chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
