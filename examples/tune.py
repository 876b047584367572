"""Find settings for each agent with the same number of trial runs, on validation prompts.

The same as ``vartext tune``: what it does, and its options, are in agents/experiments/tune.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.tune import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
