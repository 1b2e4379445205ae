"""The verdicts of `forgetless check` for pipelines: JSON, JUnit's XML, and a summary in markdown.

    reported_gate(options, result) # the verdicts alone
    gate_junit(run)                # a test case for each bound
    gate_markdown(run)             # for a pull request

Names of tasks and folders come from strangers: XML and markdown get them escaped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from forgetless.errors import printable
from forgetless.files.gate_json import (
    EXCEEDED,
    MET,
    NOT_SHOWN,
    OF_BEHAVIOUR,
    OF_DIVERGENCE,
    OF_LOSS,
    OF_TASK,
    Gate,
    JudgedBound,
)
from forgetless.files.run_json import Run
from forgetless.files.untrusted import JsonObject
from forgetless.options.check import CheckOptions
from forgetless.report.gate import (
    GATE_COLUMNS,
    bound_sentence,
    gate_row,
    gate_sentences,
    gate_table,
)
from forgetless.report.markdown import markdown_table, plain

# What each kind of bound is on.
JUDGED_ON = {
    OF_DIVERGENCE: "the rise of perplexity on the base's own answers",
    OF_LOSS: "the rise of perplexity on general text",
    OF_BEHAVIOUR: "how often an answer does it",
    OF_TASK: "accuracy",
}


def reported_gate(options: CheckOptions, result: JsonObject) -> JsonObject:
    """What `forgetless check --json` prints: the verdicts alone, without what was measured."""
    return {
        "model": options.model,
        **result["gate"],
        "not_judged": result.get("not_judged") or [],
        "seconds": result["seconds"],
    }


def gate_markdown(run: Run) -> str:
    """A summary for a pull request."""
    gate = run.gate or Gate()
    of = f"{plain(gate.tuned)} against {plain(run.configuration.get('model') or '')}"
    lines = [f"### forgetless check: {gate.verdict}", "", of, "", markdown_table(gate_table(gate))]
    lines += ["", *(f"* {plain(sentence)}" for sentence in gate_sentences(gate))]
    lines += [f"* {plain(sentence)}" for sentence in run.not_judged or ()]
    return "\n".join(lines) + "\n"


def gate_junit(run: Run) -> str:
    """JUnit's XML: a test case for each bound. An exceeded bound is a failure; one that is not
    shown is skipped, or a failure with --strict.
    """
    gate = run.gate or Gate()
    failing = [each for each in gate.bounds if _fails(each, gate)]
    skipped = gate.count(NOT_SHOWN) - sum(each.verdict == NOT_SHOWN for each in failing)
    suite = ElementTree.Element(
        "testsuite",
        name="forgetless check",
        tests=str(len(gate.bounds)),
        failures=str(len(failing)),
        errors="0",
        skipped=str(skipped),
        time=f"{run.seconds or 0:.3f}",
    )
    for each in gate.bounds:
        name = printable(f"{each.name} {each.bound}")
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"forgetless.{each.of}", name=name, time="0"
        )
        if each.verdict != MET:
            kind = "failure" if each in failing else "skipped"
            message = printable(bound_sentence(each))
            ElementTree.SubElement(case, kind, message=message).text = _measured_line(each)
        else:
            ElementTree.SubElement(case, "system-out").text = _measured_line(each)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _fails(each: JudgedBound, gate: Gate) -> bool:
    return each.verdict == EXCEEDED or (gate.strict and each.verdict == NOT_SHOWN)


def _measured_line(each: JudgedBound) -> str:
    """What was measured of a bound, on one line."""
    cells = [cell.shown for cell in gate_row(each)]
    about = JUDGED_ON.get(str(each.of), "")
    pairs = zip(GATE_COLUMNS[1:], cells[1:], strict=True)
    return printable(f"{about}; " + ", ".join(f"{name} {cell}" for name, cell in pairs))
