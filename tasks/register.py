"""register: the merged model as a version of the registry, its gates, and the report."""

from __future__ import annotations

from poemerge.params import Params
from poemerge.project import Project
from poemerge.registry.registration import Registration, log_report, register_merged
from poemerge.report.write import write_report
from tasks.report import StageReport

__all__ = ["register"]


def register(project: Project, params: Params) -> StageReport:
    """Register artifacts/merged (the same digest is the same version), judge it, and write the report.

    Raises RegistryError when the registry refuses or the merged folder is not complete.
    """
    registration = register_merged(project, params)
    # The page tells the gates, so it comes after them; the version's run keeps it beside the rest.
    log_report(project, registration.version, write_report(project, params))
    failed = [gate for gate in registration.gates if gate.verdict == "fail"]
    return StageReport(
        headline=_headline(registration),
        table=[{"gate": gate.name, "verdict": gate.verdict, "reason": gate.reason} for gate in registration.gates],
        warnings=[f"gate {gate.name}: {gate.reason}" for gate in failed],
    )


def _headline(registration: Registration) -> str:
    """What registering led to, in the past tense: the champion may be another one when this is read."""
    version = registration.version
    text = f"{version.model} version {version.version}{'' if registration.created else ' (the same bytes again)'}"
    if registration.promoted:
        before = registration.champion_before
        return text + (f" became champion in place of version {before}" if before else " became the first champion")
    if version.version == registration.champion_before:
        return text + " was champion already"
    if registration.awaits_approval:
        return text + " passed every gate, and its promotion needed approval"
    failed = ", ".join(gate.name for gate in registration.gates if gate.verdict == "fail")
    champion = registration.champion_before
    return text + f" was not promoted, {failed} failed; {f'version {champion} stayed' if champion else 'no'} champion"
