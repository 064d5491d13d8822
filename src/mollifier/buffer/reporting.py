"""Who sweeps, and what the last sweep found."""

from __future__ import annotations

from mollifier import scripts, sweeps
from mollifier.buffer.part import Part
from mollifier.keys import SWEEPER_CLAIM, SWEEPER_REPORT
from mollifier.sweeps import SweepReport

_REPORT_LIFETIME_MS = 7 * 86_400_000


class Reporting(Part):
    """The part of the buffer that sweepers share."""

    async def claim_sweep(self, token: str, lifetime_ms: int) -> bool:
        """Claim the right to sweep for so long, or prolong it; False where it is another's, whose claim runs out unless prolonged."""
        ((outcome, _),) = await self._scripts.run(
            scripts.claim(binding=[SWEEPER_CLAIM], token=token, lifetime_ms=lifetime_ms, lease_ms=lifetime_ms, void=())
        )
        return outcome == "claimed"

    async def release_sweep(self, token: str) -> None:
        """Let another sweep; a claim that is another's by now stays."""
        await self._scripts.run(scripts.release(binding=[SWEEPER_CLAIM], token=token))

    async def record_sweep(self, token: str, report: SweepReport) -> bool:
        """Store the report for everybody to see; False, and nothing changes, where the claim has been lost."""
        call = scripts.report(
            claim=SWEEPER_CLAIM,
            report=SWEEPER_REPORT,
            token=token,
            lifetime_ms=_REPORT_LIFETIME_MS,
            fields=sweeps.to_fields(report),
        )
        return await self._scripts.run(call)

    async def last_sweep(self) -> SweepReport | None:
        """Return the report of the last sweep, None where there has been none within a week."""
        return sweeps.from_fields(await self._server.run("HGETALL", SWEEPER_REPORT))
