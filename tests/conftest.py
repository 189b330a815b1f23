"""What holds for every test."""

from __future__ import annotations

import hypothesis

# A busy machine is no failure: pytest-timeout ends what hangs.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("tests")
