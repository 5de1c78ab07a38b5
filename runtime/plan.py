"""`python -m runtime.plan [--target v6e-8] MODEL`: what runtime.build would compile, printed and not kept."""

import sys

from runtime import build

if __name__ == "__main__":
    sys.exit(build.main(keeps=False))
