"""`python -m llama_fast` is the command `llama-fast`."""

import sys

from .cli import main

sys.exit(main())
