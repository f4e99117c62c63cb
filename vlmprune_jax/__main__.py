"""`python -m vlmprune_jax` is `vlmprune`."""

import sys

from vlmprune_jax.cli.main import main

sys.exit(main())
