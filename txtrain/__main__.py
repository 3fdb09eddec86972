"""What `txtrain` and `python -m txtrain` start."""

import sys

from txtrain.interrupt import EndsAtOnce, nothing_is_left


def main() -> int:
    with EndsAtOnce():
        from txtrain import cli
    code = cli.main()
    nothing_is_left()
    return code


if __name__ == "__main__":
    sys.exit(main())
