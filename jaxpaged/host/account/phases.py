"""What the host's work on a step is called in a profile: engine/step_loop.py marks it, cli/profile.py sums it up."""

from __future__ import annotations

SCHEDULE, PREPARE, LAUNCH, FETCH, COMMIT = PHASES = ("schedule", "prepare", "launch", "fetch", "commit")
