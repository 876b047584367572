"""Watch an image grow scale by scale: in the terminal, as a PNG strip, or as an animated GIF.

The same as ``vartext play``: what it does, and its options, are in agents/experiments/play.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.play import main

    sys.exit(main())
