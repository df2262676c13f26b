"""Where the command begins, as `jaxpaged` and as `python -m jaxpaged`: with an ear for Control-C before anything is
imported that takes long enough for one."""

from __future__ import annotations

import os
import sys


def main() -> int:
    try:
        import signal

        from jaxpaged.cli.interrupts import exit_at_interrupt, leave

        with exit_at_interrupt():
            from jaxpaged.cli.main import main as run
        try:
            return run()
        finally:
            signal.signal(signal.SIGINT, leave)  # Python has still to end, and jax with it
    except KeyboardInterrupt:  # between two of these
        print("jaxpaged: interrupted", file=sys.stderr, flush=True)
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
