"""``python -m irq_export``."""

from __future__ import annotations

from irq_export.cli import main

main()
