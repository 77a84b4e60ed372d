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
    version = registration.version
    text = f"{version.model} version {version.version}{'' if registration.created else ' (the same bytes again)'}"
    if registration.promoted:
        before = registration.champion_before
        return text + (f" is champion in place of version {before}" if before else " is the first champion")
    if version.version == registration.champion_before:
        return text + " is champion already"
    if registration.awaits_approval:
        return text + f" passed every gate and waits for approval: poemerge promote {version.version}"
    failed = ", ".join(gate.name for gate in registration.gates if gate.verdict == "fail")
    champion = registration.champion_before
    return (
        text + f" is candidate; {f'version {champion} stays champion' if champion else 'no champion'}: {failed} failed"
    )
