"""`python -m eagle_target`: the `eagle-target` command."""

from __future__ import annotations

from eagle_target.cli.main import main

if __name__ == "__main__":
    main()
