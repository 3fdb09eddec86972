import sys

from txtrain.cli import main

sys.exit(main())
