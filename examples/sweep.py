"""Look for the regime in which GRPO learns, on validation words: short runs over a grid, and what there is to learn.

The same as ``vartext sweep``: what it does, and its options, are in agents/experiments/sweep.py.
"""

import sys

from var_env.agents_clash import check_agents

if __name__ == "__main__":
    try:
        check_agents()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from agents.experiments.sweep import main

    sys.exit(main())
