"""What holds for every test."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure; pytest-timeout ends hangs
hypothesis.settings.load_profile("tests")
