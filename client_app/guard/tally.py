"""What servers have used of a client's bounds, by run and in all: ``<state-dir>/records/<client-id>.tally.json``.

It is written before the work begins, so that a killed plan counts, too. The size of an answer is added before it
leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_app.guard.policy import Parts, Policy, PolicyError, tally_of
from fedalloy_adapters.files.atomic_files import locked, private_folder, write_durably
from fedalloy_adapters.files.sealed_json import sealed, unsealed
from proto.fedalloy.v1 import plan_pb2

_ALL = "all runs"
"""Key of the totals; no run has this name."""


class TallyError(ValueError):
    """The tally is damaged."""


class Tally:
    """One client's tally; several processes may add to it."""

    def __init__(self, state_dir: Path, client_id: str) -> None:
        self.client_id = client_id
        self.path = state_dir / "records" / f"{client_id}.tally.json"

    def begin(self, plan: plan_pb2.Plan, policy: Policy, parts_of: Parts) -> None:
        """Add what a plan uses.

        Args:
            plan: what is asked.
            policy: the bounds.
            parts_of: how many examples of each task a split has now.

        Raises:
            PolicyError: it would be more than a run may use, or a measurement is too close to an earlier one.
            TallyError: the file is damaged.
        """
        self._add(plan.run_name, tally_of(plan), policy, plan, parts_of)

    def leave(self, plan: plan_pb2.Plan, uploads: Mapping[str, bytes], policy: Policy) -> None:
        """Add what is about to leave; errors as for :meth:`begin`."""
        if size := sum(map(len, uploads.values())):
            self._add(plan.run_name, {"upload_bytes": size}, policy)

    def of(self, run_name: str = "") -> dict[str, Any]:
        """What a run has used; without a name, all runs."""
        return dict(self._read().get(run_name or _ALL, {}))

    def _add(
        self,
        run_name: str,
        more: Mapping[str, int],
        policy: Policy,
        plan: plan_pb2.Plan | None = None,
        parts_of: Parts | None = None,
    ) -> None:
        private_folder(self.path.parent)
        with locked(self.path.with_suffix(".lock")):
            found = self._read()
            for scope, name in (("run", run_name), ("total", _ALL)):
                taken = found.setdefault(name, {})
                for what, count in more.items():
                    taken[what] = int(taken.get(what, 0)) + count
                    self._require(policy, scope, what, taken[what])
            if plan is not None and parts_of is not None:
                seen = found[run_name].get("measured", {})
                if measured := policy.require_apart(plan, parts_of, seen):
                    found[run_name]["measured"] = measured
            write_durably(self.path, sealed(found))

    def _require(self, policy: Policy, scope: str, what: str, count: int) -> None:
        key, unit = (f"max_{scope}_upload_mb", 10**6) if what == "upload_bytes" else (f"max_{scope}_{what}", 1)
        most = getattr(policy, key, 0)
        if most and count / unit > most:
            taken = "this run" if scope == "run" else "all runs together"
            raise PolicyError(
                f"client {self.client_id!r} refuses: {count / unit:g} for {taken} with this plan, its "
                f"client.{key.replace('_', '-')} is {most:g}"
            )

    def _read(self) -> dict[str, Any]:
        try:
            return unsealed(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            raise TallyError(f"{self.path} is damaged ({error}); what earlier runs have used is not known") from None
