"""Look for the regime in which GRPO learns, on validation words: short runs over a grid, and what there is to learn.

The same as ``vartext sweep``: what it does, and its options, are in agents/experiments/sweep.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.sweep import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
