"""``python -m hylorada_jax``, and the command ``hylorada``."""

import sys


def main() -> None:
    """Runs the command; an interrupt while its modules are imported ends it like any later one."""
    try:
        from hylorada_jax.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
