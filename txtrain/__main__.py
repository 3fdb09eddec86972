"""What `txtrain` and `python -m txtrain` start."""

import sys

from txtrain.parallel.early_signals import EndsAtOnce, nothing_is_left


def main() -> int:
    with EndsAtOnce():
        from txtrain.cli import main as cli
    code = cli.main()
    nothing_is_left()
    return code


if __name__ == "__main__":
    sys.exit(main())
