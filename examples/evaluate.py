"""Measure a policy on held-out prompts: the paper's metrics with 95 % bootstrap intervals, and a picture.

The same as ``vartext evaluate``: what it does, and its options, are in agents/experiments/evaluate.py.
"""

import sys

if __name__ == "__main__":
    try:
        from agents.experiments.evaluate import main
    except ImportError as error:  # perhaps there is another package of the name
        from var_env.agents_clash import find_clash

        sys.exit(f"error: {find_clash() or error}")
    sys.exit(main())
