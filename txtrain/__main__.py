"""What `txtrain` and `python -m txtrain` start."""

import sys

from txtrain.interrupt import EndsAtOnce


def main() -> int:
    with EndsAtOnce():
        from txtrain import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
