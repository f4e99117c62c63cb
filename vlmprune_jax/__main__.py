"""`python -m vlmprune_jax` is `vlmprune`."""

import sys

from vlmprune_jax.run.cli.main import main

sys.exit(main())
