"""Train agents from the same base policy with the same budget and compare them on the same held-out prompts.

The same as ``vartext compare``: what it does, and its options, are in agents/experiments/compare.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.compare import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
