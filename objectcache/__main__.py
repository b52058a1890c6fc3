"""`python -m objectcache` is the command `objectcache`. Nothing else happens here."""

import sys

from objectcache.cli import main

sys.exit(main())
