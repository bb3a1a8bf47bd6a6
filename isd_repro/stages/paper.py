"""Command `paper check`: the published tables recomputed, and what the sources say differently of one thing."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from isd_repro.report import paper as papers
from isd_repro.report import published
from isd_repro.report.draws import published_findings
from isd_repro.report.paper import Disagreement, Paper
from isd_repro.report.published import Check


def check(*, as_json: bool = False) -> None:
    """Print on standard output which printed means and differences do not add up, what the draws say, and what was read.

    It needs no profile, no data and no run: it is about the paper's own numbers.
    """
    paper = papers.load()
    found = published.checks(paper)
    lines = json.dumps(_plain(paper, found), indent=1, sort_keys=True, ensure_ascii=False) if as_json else _lines(paper, found)
    sys.stdout.write(f"{lines}\n")


def _lines(paper: Paper, found: list[Check]) -> str:
    odd = [check for check in found if check.outcome != "adds up"]
    titles = {table.id: table.title for table in paper.tables}
    lines = [f"Computed: {len(found)} printed means and differences, {len(odd)} do not add up as printed."]
    lines += [f"- {titles[check.table]}: {check.sentence}." for check in odd]
    for table in paper.tables:
        said = published_findings(table)
        if said:
            lines += ["", f"Computed: {table.title} under our statistics, misprints corrected."]
            lines += [f"- {finding.plain}" for finding in said]
    lines += ["", f"Read, not computed: {len(paper.disagreements)} disagreements between sources."]
    lines += [f"- {_disagreement(item, paper)}" for item in paper.disagreements]
    lines += ["", "Not in any source that was read:"]
    return "\n".join([*lines, *(f"- {words}" for words in paper.absent)])


def _disagreement(item: Disagreement, paper: Paper) -> str:
    said = "; ".join(f"{paper.sources[source].name}: {words}" for source, words in item.says.items())
    return f"{item.about}. {said}. Verdict: {item.verdict} (confidence {item.confidence})."


def _plain(paper: Paper, found: list[Check]) -> dict[str, Any]:
    gains = {table.id: [asdict(gain) for gain in published.gains(table)] for table in paper.tables if table.contest}
    checks = [
        {**asdict(check), "printed": float(check.printed), "recomputed": float(check.recomputed), "sentence": check.sentence}
        for check in found
    ]
    return {
        "computed": {"checks": _rounded(checks), "gains": _rounded(gains)},
        "read": [item.model_dump(mode="json") for item in paper.disagreements],
        "absent": list(paper.absent),
        "sources": {name: source.model_dump() for name, source in paper.sources.items()},
    }


def _rounded(tree: Any) -> Any:
    """Floats to 6 decimals, so that sums in binary do not show."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rounded(value) for value in tree]
    return round(tree, 6) if isinstance(tree, float) else tree
