"""audit: runs the parts of an audit, one after another, and collects what they found."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from lit_did.audit.report import Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.data.reading import Columns
from lit_did.scoring.models import Model


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        data: The pairs.
        settings: How it was made.
        parts: What each part found, by name.
    """

    data: AuditData
    settings: Settings
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """All findings, faults first, the most severe first."""
        found = [finding for part in self.parts.values() for finding in part.findings]
        return sorted(found, key=lambda finding: (not finding.raised, -finding.severity))


def audit(
    pairs: Any,
    *,
    val: Any = None,
    tokenizer: Any = None,
    reference: Model | None = None,
    policy: Model | None = None,
    sides: bool = False,
    columns: Columns | None = None,
    max_pairs: int | None = None,
    settings: Settings | None = None,
) -> Audit:
    """Audits preference pairs."""
    settings = settings or Settings()
    found = Audit(AuditData(pairs, "pairs", columns=columns, max_pairs=max_pairs, warn=warnings.warn), settings)
    return found
