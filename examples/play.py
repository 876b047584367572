"""Watch a picture grow scale by scale: in the terminal, as a PNG strip, or as an animated GIF.

The same as ``vartext play``: what it does, and its options, are in agents/experiments/play.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.play import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
