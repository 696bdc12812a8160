"""`python -m fiducial` is the command."""

from .cli import main

raise SystemExit(main())
